"""W2A8 linears for a model of your own: pack ternary weights once, then multiply with PyTorch's or CuPy's arrays.

    import bitnet_numba as bn

    linear = bn.pack_linear(ternary, scale)      # ternary int8 [N, K] of -1, 0, 1; y = x @ (ternary * scale).T
    y = torch.as_tensor(bn.w2a8_linear(x, linear, stream=torch.cuda.current_stream()), device="cuda")

x is quantised to int8, each token by its own absmax (`bitnet_numba.quantize`); the products are exact integers; y is
float32. These are the operations of `bitnet_numba.reference`, in their order: y is the same to the bit.

    one token        gemv, which quantises as it multiplies: one launch. (K no multiple of 32: quantize, then gemv)
    more tokens      quantize, then gemm

Streams. A call enqueues on the caller's stream and returns; it neither waits nor lets anything overlap it, so it is
ordered like a kernel of the caller's own: x may be written before it and y read after it on that stream. Quantised
activations lie in memory that belongs to the stream. It grows to the largest product seen there, is kept for the
MAX_STREAMS streams used last, and is what a captured graph goes on using.

Graphs. The first call with a shape compiles, allocates, and describes matrices to the TMA (128 bytes for each matrix
and number of tokens, which are kept): make one call before capturing, and pass `out`.

Host time. A call checks its operands and prepares its launches anew. Where arrays stay where they are, prepare them
once: `gemv(device, linear, x, out)` and `gemm(...)` return a launch, which is called with a stream.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.linear.gemm import gemm
from bitnet_numba.kernels.linear.gemv import gemv
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations, check_segments
from bitnet_numba.kernels.linear.quantize import quantize
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.runtime.device import CudaDevice, Device, usable_device
from bitnet_numba.kernels.runtime.driver import driver_call, enum_member, stream_handle
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView, as_device_array
from bitnet_numba.packing import BLOCK_COLS, pack_ternary, padded_shape

MAX_STREAMS = 32  # whose scratch memory is kept
ALIGNMENT = 16  # bytes: the kernels' widest access
MAX_INDEX = 2**31 - 1  # the kernels' indices are int32
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2  # CU_STREAM_LEGACY, which 0 stands for too, and CU_STREAM_PER_THREAD

_lock = threading.Lock()  # two launches that share scratch are enqueued together
_devices: dict[int, tuple[CudaDevice, "Scratch"]] = {}


class DeviceMatrix(DeviceView):
    """An array with a shape in device memory: `cupy.asarray` and `torch.as_tensor` take it without a copy."""

    def __init__(self, owner: DeviceArray, shape: tuple[int, ...]):
        super().__init__(owner.address, owner.size, owner.dtype)
        self.owner, self.shape = owner, shape

    def read(self) -> np.ndarray:
        """A copy on the host, made after all work on the device."""
        return super().read().reshape(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3}


class Scratch:
    """A device's memory for quantised activations, apart for each stream."""

    def __init__(self, device: Device):
        self._device = device
        self._streams: OrderedDict[Any, list[QuantizedActivations]] = OrderedDict()  # the one used last is last
        self.all_tokens = device.array(np.array([MAX_INDEX], np.int32))  # gemm's count: as many as there are

    def of(self, stream: Any, num_tokens: int, K: int) -> QuantizedActivations:
        """A stream's memory for so many tokens, as of `QuantizedActivations.empty` but not initialised.

        What is too small is kept beside the new: a captured graph may use it. Sizes double, so that is less again.
        """
        buffers = self._streams.setdefault(stream, [])
        self._streams.move_to_end(stream)
        size = QuantizedActivations.q_size(num_tokens, K)
        for buffer in buffers:
            if buffer.q.size >= size and buffer.scale.size >= num_tokens:
                return buffer
        q_size, tokens = (1 << (n - 1).bit_length() for n in (size, num_tokens))
        buffers.append(
            QuantizedActivations(
                self._device.empty(q_size, np.int8),
                self._device.empty(tokens, np.float32),
                self._device.empty(tokens, np.int32),
            )
        )
        if len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)  # freeing waits for the work that uses it
        return buffers[-1]


def pack_linear(
    ternary: Any,
    scales: Any,
    bias: Any = None,
    segments: Sequence[int] | None = None,
    device: Device | None = None,
) -> PackedLinear:
    """Ternary weights, packed and uploaded: y = x @ (ternary * scale).T + bias, by `w2a8_linear`.

    ternary: int8 [N, K] of -1, 0 and 1, or a list of up to three such matrices, which are its segments (q, k and v in
        one product: one read of x); a NumPy array or one on a device, as are scales and bias.
    scales: a positive number, or one for each segment; kept as float32.
    bias: [N], kept as float32, or None.
    segments: of a single matrix, how many rows share a scale, in order, N in all; by default one, N.
    device: by default that of the context current on this thread, else the first GPU.

    Packing runs on the host: 0.2 s for 35 million weights. Raises ValueError for weights, scales or segments that do
    not fit, BackendError without a usable GPU.
    """
    if isinstance(ternary, list | tuple):
        if segments is not None:
            raise ValueError("pack_linear: a list of matrices has its own segments")
        weights, segments = _stacked(ternary)
    else:
        weights = _host(ternary, "ternary")
    words = pack_ternary(weights)
    N, K = weights.shape
    rows = (N,) if segments is None else tuple(int(n) for n in segments)
    check_segments("pack_linear", rows, gated=False)
    if sum(rows) != N:
        raise ValueError(f"pack_linear: segments {rows} are {sum(rows)} rows, ternary has {N}")
    numbers = {"scales": (np.atleast_1d(_host(scales, "scales")), len(rows))}
    if bias is not None:
        numbers["bias"] = _host(bias, "bias"), N
    for name, (values, count) in numbers.items():
        if values.dtype.kind not in "fiu" or values.shape != (count,):
            raise ValueError(f"pack_linear: {name} must be {count} numbers, not {values.dtype} of shape {values.shape}")
        if not (np.abs(values.astype(np.float64)) <= np.finfo(np.float32).max).all():  # NaN is not either
            raise ValueError(f"pack_linear: {name} must be finite in float32")
    if not (numbers["scales"][0].astype(np.float32) > 0).all():
        raise ValueError("pack_linear: scales must be positive in float32")
    if device is None:
        device, _ = _device(_current_index() or 0)
    uploaded = {name: device.array(values.astype(np.float32)) for name, (values, _) in numbers.items()}
    return PackedLinear(device.array(words), uploaded["scales"], rows, K, uploaded.get("bias"))


def w2a8_linear(x: Any, linear: PackedLinear, out: Any = None, stream: Any = None) -> Any:
    """x times a packed linear: float32 [..., K] -> float32 [..., N]. Without tokens nothing is launched.

    x: a contiguous array of float32 on the current device, with `__cuda_array_interface__` (PyTorch, CuPy, Numba). It
    must be finite: with NaN or infinity in a token all of its y is NaN or infinite.
    out: an array for y, which is returned; by default a new `DeviceMatrix`, which `cupy.asarray` and `torch.as_tensor`
    take without a copy.
    stream: of PyTorch, CuPy, Numba or cuda.core, or a handle; by default the legacy default stream, which is PyTorch's
    and CuPy's too unless they were told otherwise.

    Raises ValueError, naming sizes and dtypes, for arrays that do not fit, are not aligned to 16 bytes, or lie on
    another device than the current one; BackendError if the GPU is unusable or out of memory.
    """
    array, shape = _operand(x, linear)
    if not array.size:
        result = DeviceMatrix(DeviceView(0, 0, np.float32), shape) if out is None else out
        _output(result, shape)
        return result
    index = _checked_index(array)
    device, scratch = _device(index)
    handle = int(stream_handle(stream))
    result = DeviceMatrix(device.empty(math.prod(shape), np.float32), shape) if out is None else out
    with _lock:
        for launch in _launches(device, linear, array, _output(result, shape), scratch, _stream_key(handle)):
            launch(handle)
    return result


def _stream_key(handle: int) -> Any:
    """What tells streams apart: two handles are the default stream's, and one is another stream in each thread."""
    if handle == PER_THREAD_STREAM:
        return handle, threading.get_ident()
    return 0 if handle == LEGACY_STREAM else handle


def _launches(
    device: Device, linear: PackedLinear, x: DeviceArray, out: DeviceArray, scratch: Scratch, stream: Any
) -> list[Launch]:
    """What a call enqueues. Only the second launch may overlap another, which is the first: what ran before may have
    written the weights, which kernels read without waiting for it."""
    num_tokens, K = x.size // linear.K, linear.K
    if num_tokens == 1 and K % BLOCK_COLS == 0:
        return [gemv(device, linear, x, out, use_pdl=False)]
    q = scratch.of(stream, num_tokens, K)
    first = quantize(device, x, q, num_tokens, K, use_pdl=False)
    if num_tokens == 1:
        return [first, gemv(device, linear, q, out)]
    return [first, gemm(device, linear, q, scratch.all_tokens, out, num_tokens)]


def _operand(x: Any, linear: PackedLinear) -> tuple[DeviceArray, tuple[int, ...]]:
    """x as a flat array, and the shape of y."""
    N, K = linear.N, linear.K
    (array,) = checked("w2a8_linear", f"a {N} x {K} product", x=(x, 0, "float32"))
    shape = tuple(x.__cuda_array_interface__["shape"])
    if not shape or shape[-1] != K:
        raise ValueError(f"w2a8_linear: x has shape {shape}, a {N} x {K} product takes [..., {K}]")
    num_tokens = array.size // K
    if num_tokens * max(N, padded_shape(1, K)[1]) > MAX_INDEX:
        raise ValueError(f"w2a8_linear: {num_tokens} tokens of a {N} x {K} product have more than {MAX_INDEX} elements")
    for name, operand in (("x", array), ("linear.words", as_device_array(linear.words))):
        _check_alignment(name, operand)
    return array, (*shape[:-1], N)


def _output(out: Any, shape: tuple[int, ...]) -> DeviceArray:
    """The array for y, flat."""
    (array,) = checked("w2a8_linear", f"y {shape}", out=(out, math.prod(shape), "float32"))
    interface = out.__cuda_array_interface__
    if tuple(interface["shape"]) != shape:
        raise ValueError(f"w2a8_linear: out has shape {tuple(interface['shape'])}, y has {shape}")
    if interface["data"][1]:
        raise ValueError("w2a8_linear: out is read-only")
    _check_alignment("out", array)
    return array


def _check_alignment(name: str, array: DeviceArray) -> None:
    if array.size and array.address % ALIGNMENT:
        raise ValueError(f"w2a8_linear: {name} starts {array.address % ALIGNMENT} bytes past a multiple of {ALIGNMENT}")


def _stacked(matrices: Sequence[Any]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Segments [N_i, K] as one matrix, and their rows. (What is in them, `pack_ternary` checks.)"""
    parts = [_host(matrix, f"ternary[{i}]") for i, matrix in enumerate(matrices)]
    shapes = [part.shape for part in parts]
    if not parts or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"pack_linear: segments must be matrices with equally many columns, not of shapes {shapes}")
    return np.concatenate(parts), tuple(rows for rows, _ in shapes)


def _host(array: Any, name: str) -> np.ndarray:
    """An array on the host; a device's is copied after all work there."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return np.asarray(array)
    try:
        flat = as_device_array(array)
    except ValueError as error:
        raise ValueError(f"pack_linear: {name}: {error}") from None
    _device(_checked_index(flat))
    return flat.read().reshape(interface["shape"])


def _current_index() -> int | None:
    """Which device's context is current on this thread; None if none is, or there is no driver."""
    try:
        from cuda.bindings import driver

        status, context = driver.cuCtxGetCurrent()
    except Exception:  # noqa: BLE001 - no packages or no driver, which `usable_device` has words for
        return None
    if status != driver.CUresult.CUDA_SUCCESS or not int(context):
        return None
    return int(driver_call("cuCtxGetDevice"))


def _checked_index(array: DeviceArray) -> int:
    """Which device an array lies on. Raises ValueError if it is not the current one."""
    current = _current_index()
    attribute = enum_member("CUpointer_attribute", "DEVICE_ORDINAL")
    index = int(driver_call("cuPointerGetAttribute", attribute, array.address))
    if current not in (None, index):
        raise ValueError(f"w2a8_linear: the array is on device {index}, and device {current} is current")
    return index


def _device(index: int) -> tuple[CudaDevice, Scratch]:
    """A device, current on this thread, and its scratch memory."""
    with _lock:
        if index not in _devices:
            if _devices:
                raise BackendError(f"kernels are loaded on device {next(iter(_devices))}; a process can use one device")
            device = usable_device(index)
            device.activate()
            _devices[index] = device, Scratch(device)
        device, scratch = _devices[index]
    if _current_index() is None:  # a thread that has not used CUDA yet
        device.activate()
    return device, scratch
