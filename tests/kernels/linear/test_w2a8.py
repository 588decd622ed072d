"""Packing and multiplying for a model of one's own: without a GPU what is refused and what is launched; with one, that
PyTorch and CuPy get the reference's arithmetic, to the bit, in the order of their streams."""

import threading
from typing import Any

import numpy as np
import pytest

import bitnet_numba as bn
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.linear import w2a8
from bitnet_numba.kernels.linear.operands import PackedLinear
from bitnet_numba.kernels.linear.w2a8 import MAX_STREAMS, DeviceMatrix, Scratch, pack_linear, w2a8_linear
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.memory import DeviceView
from bitnet_numba.packing import pack_ternary
from bitnet_numba.quantize import quantize_activations
from tests.kernels.harness import SIMULATED, needs_gpu, why_no_gpu

SHAPES = [(1, 40, 64), (1, 40, 70), (1, 3840, 2560), (2, 40, 70), (33, 130, 101), (200, 2560, 6912)]  # M, N, K


def ternary(N: int, K: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (N, K)).astype(np.int8)


def dry(N: int = 40, K: int = 64, **options: Any) -> tuple[DryRunDevice, PackedLinear]:
    device = DryRunDevice(90, 132)
    return device, pack_linear(ternary(N, K), 0.5, device=device, **options)


def array(*shape: int, dtype: Any = np.float32, address: int = 0, **changes: Any) -> Any:
    """Something with `__cuda_array_interface__`, as other libraries have."""
    interface = {"shape": shape, "typestr": np.dtype(dtype).str, "data": (address, False), "version": 3} | changes
    return type("Array", (), {"__cuda_array_interface__": interface})()


def names(device: DryRunDevice, linear: PackedLinear, num_tokens: int) -> list[str]:
    """The kernels of a call, each without its constants."""
    x, y = (DeviceView(0, num_tokens * columns, np.float32) for columns in (linear.K, linear.N))
    launches = w2a8._launches(device, linear, x, y, Scratch(device), 0)
    return [" ".join(launch.name.replace("[", " ").split()[:3]) for launch in launches]


# ---- Packing --------------------------------------------------------------------------------------------------------


def test_pack_linear_describes_the_weights() -> None:
    _, linear = dry()
    assert (linear.N, linear.K, linear.segments, linear.bias) == (40, 64, (40,), None)
    assert [a.dtype for a in (linear.words, linear.scales)] == [np.int32, np.float32]
    qkv = pack_linear(ternary(40, 70), (1, 2, 3), np.zeros(40), (20, 10, 10), DryRunDevice(90, 132))
    assert qkv.segments == (20, 10, 10) and qkv.scales.size == 3
    assert qkv.bias.size == 40 and qkv.bias.dtype == np.float32


def test_pack_linear_stacks_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[np.ndarray] = []
    monkeypatch.setattr(w2a8, "pack_ternary", lambda w: packed.append(w) or pack_ternary(w))
    w, device = ternary(40, 70), DryRunDevice(90, 132)
    linear = pack_linear([w[:20], w[20:33], w[33:]], (1, 2, 3), device=device)
    assert (linear.N, linear.K, linear.segments, linear.scales.size) == (40, 70, (20, 13, 7), 3)
    assert np.array_equal(packed[0], w)
    assert pack_linear((w,), 1.0, device=device).segments == (40,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((ternary(4, 8).astype(np.int16), 1.0), "must be an int8 array, not int16"),
        ((ternary(4, 8)[0], 1.0), "must be a matrix"),
        ((ternary(4, 8) * 2, 1.0), "must be -1, 0 or 1"),
        ((ternary(4, 8), (1.0, 2.0)), r"scales must be 1 numbers, not float64 of shape \(2,\)"),
        ((ternary(4, 8), "1"), "scales must be 1 numbers, not <U1"),
        ((ternary(4, 8), np.nan), "scales must be finite"),
        ((ternary(4, 8), 1e39), "scales must be finite"),
        ((ternary(4, 8), 0.0), "scales must be positive"),
        ((ternary(4, 8), 1e-50), "scales must be positive in float32"),
        ((ternary(4, 8), (1.0, -2.0), None, (2, 2)), "scales must be positive"),
        ((ternary(4, 8), 1.0, np.zeros(3)), r"bias must be 4 numbers, not float64 of shape \(3,\)"),
        ((ternary(4, 8), (1.0, 2.0), None, (2, 3)), r"segments \(2, 3\) are 5 rows, ternary has 4"),
        ((ternary(4, 8), np.ones(4), None, (1, 1, 1, 1)), "rows come in 1 to 3 segments"),
        (([], 1.0), r"segments must be matrices .* not of shapes \[\]"),
        (([ternary(4, 8), ternary(4, 9)], (1.0, 2.0)), r"equally many columns, not of shapes \[\(4, 8\), \(4, 9\)\]"),
        (([ternary(4, 8)[0]], 1.0), r"segments must be matrices .* not of shapes \[\(8,\)\]"),
        (([ternary(4, 8), ternary(2, 8).astype(np.float32)], (1.0, 2.0)), "must be an int8 array, not float32"),
        (([ternary(4, 8)] * 2, 1.0), r"scales must be 2 numbers, not float64 of shape \(1,\)"),
        (([ternary(4, 8)] * 4, np.ones(4)), "rows come in 1 to 3 segments"),
        (([ternary(4, 8)], 1.0, None, (4,)), "a list of matrices has its own segments"),
    ],
)
def test_pack_linear_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_linear(*arguments, device=DryRunDevice(90, 132))


@pytest.mark.skipif(not why_no_gpu() or SIMULATED, reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_line() -> None:
    with pytest.raises(BackendError):
        pack_linear(ternary(4, 8), 1.0)


# ---- What is launched -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_tokens, K, expected",
    [
        (1, 64, ["gemv 64 quantize"]),
        (1, 70, ["quantize 70,", "gemv 70 int8"]),  # the gemv would read x up to column 96
        (2, 64, ["quantize 64,", "gemm"]),
        (300, 70, ["quantize 70,", "gemm"]),
    ],
)
def test_launch_choice(num_tokens: int, K: int, expected: list[str]) -> None:
    device, linear = dry(K=K)
    found = names(device, linear, num_tokens)
    assert len(found) == len(expected)
    assert all(name.startswith(start) for name, start in zip(found, expected, strict=True)), found


@pytest.mark.parametrize("num_tokens, K", [(64, 64), (128, 32), (6, 672)])
def test_scratch_has_room_for_what_a_product_reads(num_tokens: int, K: int) -> None:
    """Which is more than its tokens, where columns are no multiple of 128: these fill a power of two, or nearly."""
    device, linear = dry(K=K)
    assert [name.split()[0] for name in names(device, linear, num_tokens)] == ["quantize", "gemm"]


def test_scratch_is_apart_for_each_stream_and_stays_where_it_is() -> None:
    scratch = Scratch(DryRunDevice(90, 132))
    first = scratch.of("a", 5, 70)
    assert first.q.size >= 5 * 96 and first.scale.size >= 5 and first.q_sum.size >= 5
    assert scratch.of("a", 4, 70) is first and scratch.of("b", 4, 70) is not first
    larger = scratch.of("a", 500, 70)
    assert larger is not first and scratch.of("a", 5, 70) is first and scratch.of("a", 400, 70) is larger
    for stream in range(MAX_STREAMS - 1):
        scratch.of(stream, 1, 32)
        assert scratch.of("a", 5, 70) is first
    assert len(scratch._streams) == MAX_STREAMS and "b" not in scratch._streams


def test_streams_are_told_apart() -> None:
    assert w2a8._stream_key(0) == w2a8._stream_key(1) != w2a8._stream_key(4096)
    keys = [w2a8._stream_key(2)]
    thread = threading.Thread(target=lambda: keys.append(w2a8._stream_key(2)))
    thread.start()
    thread.join()
    assert keys[0] != keys[1]


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, message",
    [
        (np.zeros((2, 64), np.float32), "x: expected an array in device memory, not ndarray"),
        (array(2, 64, dtype=np.float16), "x must be float32, not float16"),
        (array(2, 32), r"x has shape \(2, 32\), a 40 x 64 product takes \[\.\.\., 64\]"),
        (array(0, 32), r"x has shape \(0, 32\), a 40 x 64 product takes \[\.\.\., 64\]"),
        (array(64, 0), r"x has shape \(64, 0\), a 40 x 64 product takes"),
        (array(), r"x has shape \(\), a 40 x 64 product takes"),
        (array(2, 64, address=4104), "x starts 8 bytes past a multiple of 16"),
        (array(2, 64, strides=(4, 8)), "is not contiguous"),
        (array(1 << 25, 64), "33554432 tokens of a 40 x 64 product have more than 2147483647 elements"),
    ],
)
def test_w2a8_linear_refuses_x(x: Any, message: str) -> None:
    _, linear = dry()
    with pytest.raises(ValueError, match=f"^w2a8_linear: .*{message}"):
        w2a8_linear(x, linear)


@pytest.mark.parametrize(
    "out, message",
    [
        (array(2, 40, dtype=np.float64), "out must be float32, not float64"),
        (array(40, 2), r"out has shape \(40, 2\), y has \(2, 40\)"),
        (array(2, 39), r"out holds 78 elements, y \(2, 40\) takes 80"),
        (array(2, 40, address=20), "out starts 4 bytes past"),
        (array(2, 40, data=(0, True)), "out is read-only"),
    ],
)
def test_w2a8_linear_refuses_out(out: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^w2a8_linear: {message}"):
        w2a8._output(out, (2, 40))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
def test_no_tokens_give_an_empty_result(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without looking for a device: arrays without elements have no address."""
    monkeypatch.delattr(w2a8, "driver_call")
    monkeypatch.delattr(w2a8, "usable_device")
    _, linear = dry()
    x, y = array(*shape, 64), array(*shape, 40)
    assert w2a8_linear(x, linear).__cuda_array_interface__["shape"] == (*shape, 40)
    assert w2a8_linear(x, linear, y) is y
    with pytest.raises(ValueError, match="out has shape"):
        w2a8_linear(x, linear, array(*shape, 41))


def test_an_array_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, linear = dry()
    monkeypatch.setattr(w2a8, "_current_index", lambda: 0)
    monkeypatch.setattr(w2a8, "driver_call", lambda *_: 1)
    with pytest.raises(ValueError, match="the array is on device 1, and device 0 is current"):
        w2a8_linear(array(2, 64), linear)


def test_a_second_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w2a8, "_devices", {0: (DryRunDevice(90, 132), None)})
    with pytest.raises(BackendError, match="kernels are loaded on device 0; a process can use one device"):
        w2a8._device(1)


def test_the_result_is_an_array_with_a_shape() -> None:
    y = DeviceMatrix(DeviceView(4096, 80, np.float32), (2, 40))
    assert y.__cuda_array_interface__ == {"shape": (2, 40), "typestr": "<f4", "data": (4096, False), "version": 3}


def test_public_names() -> None:
    assert (bn.pack_linear, bn.w2a8_linear, bn.PackedLinear) == (pack_linear, w2a8_linear, PackedLinear)


# ---- On a GPU -------------------------------------------------------------------------------------------------------


def example(M: int, N: int, K: int) -> tuple[np.ndarray, np.ndarray, PackedLinear]:
    """x, the reference's y for it, and the weights on the device: three segments of odd scales, and a bias."""
    rng = np.random.default_rng(M * N + K)
    w, x = ternary(N, K, K), (rng.standard_normal((M, K)) * rng.uniform(0.01, 100, (M, 1))).astype(np.float32)
    segments, scales = (N // 2, 5, N - N // 2 - 5), np.array([0.0137, 1.71, 0.29], np.float32)
    bias = rng.standard_normal(N).astype(np.float32)
    q, s = quantize_activations(x)
    acc = q.astype(np.int32) @ w.T.astype(np.int32)
    y = acc.astype(np.float32) * np.repeat(scales, segments) / s + bias
    return x, y, pack_linear(w, scales, bias, segments)


@needs_gpu
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_pytorch(M: int, N: int, K: int) -> None:
    torch = pytest.importorskip("torch")
    x, expected, linear = example(M, N, K)
    on_device = torch.from_numpy(x).cuda()
    y = torch.as_tensor(w2a8_linear(on_device, linear), device="cuda")
    assert np.array_equal(y.cpu().numpy(), expected)
    if M == 1:
        assert np.array_equal(w2a8_linear(on_device[0], linear).read(), expected[0])
    out = torch.full((M, N), torch.nan, device="cuda")
    assert w2a8_linear(on_device, linear, out) is out
    assert np.array_equal(out.cpu().numpy(), expected)
    empty = torch.as_tensor(w2a8_linear(on_device[:0], linear), device="cuda")
    assert empty.shape == (0, N) and empty.dtype == torch.float32
    with pytest.raises(ValueError, match="x must be float32, not float16"):
        w2a8_linear(on_device.half(), linear)


@needs_gpu
@pytest.mark.parametrize(("M", "N", "K"), [(1, 2560, 2560), (1, 130, 101), (64, 2560, 2560)])
def test_pytorch_streams(M: int, N: int, K: int) -> None:
    """x is made late on a stream, and read and overwritten there; several streams at once do not meet."""
    torch = pytest.importorskip("torch")
    x, expected, linear = example(M, N, K)
    given = torch.from_numpy(x).cuda()
    streams = [torch.cuda.Stream() for _ in range(3)]
    buffers = [torch.full_like(given, torch.nan) for _ in streams]
    outs = [torch.empty(M, N, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for round_ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000)
                torch.mul(given, 2.0**i, out=buffers[i])
                w2a8_linear(buffers[i], linear, outs[i], stream if round_ % 2 else stream.cuda_stream)
                buffers[i].fill_(torch.nan)
    torch.cuda.synchronize()
    assert np.array_equal(outs[0].cpu().numpy(), expected)
    for i, out in enumerate(outs[1:], 1):
        alone = w2a8_linear(given * 2.0**i, linear).read()
        assert np.array_equal(out.cpu().numpy(), alone)


@needs_gpu
@pytest.mark.parametrize("M", [1, 64])
def test_pytorch_graph(M: int) -> None:
    """A captured call, replayed on other values."""
    torch = pytest.importorskip("torch")
    x, expected, linear = example(M, 2560, 2560)
    given, out = torch.zeros(M, 2560, device="cuda"), torch.zeros(M, 2560, device="cuda")
    stream = torch.cuda.Stream()
    w2a8_linear(given, linear, out, stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        w2a8_linear(given, linear, out, stream)
    given.copy_(torch.from_numpy(x))
    graph.replay()
    torch.cuda.synchronize()
    assert np.array_equal(out.cpu().numpy(), expected)


@needs_gpu
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_cupy(M: int, N: int, K: int) -> None:
    cupy = pytest.importorskip("cupy")
    x, expected, linear = example(M, N, K)
    assert np.array_equal(cupy.asarray(w2a8_linear(cupy.asarray(x), linear)).get(), expected)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        doubled = cupy.asarray(x) * np.float32(0.5) * np.float32(2)
        out = cupy.full((M, N), np.nan, np.float32)
        w2a8_linear(doubled, linear, out, stream)
        assert np.array_equal(out.get(), expected)
    packed_on_device = pack_linear(cupy.asarray(ternary(N, K, K)), cupy.float32(1))
    assert packed_on_device.N == N


@needs_gpu
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_numba(M: int, N: int, K: int) -> None:
    from numba import cuda

    x, expected, linear = example(M, N, K)
    out = cuda.device_array((M, N), np.float32)
    w2a8_linear(cuda.to_device(x), linear, out)
    assert np.array_equal(out.copy_to_host(), expected)
    assert np.array_equal(w2a8_linear(cuda.to_device(x).reshape(1, M, K), linear).read(), expected[None])


@needs_gpu
@pytest.mark.alone
def test_calls_do_not_leak() -> None:
    from numba import cuda

    from bitnet_numba.kernels.runtime.device import usable_device

    x, _, linear = example(200, 2560, 6912)
    on_device = cuda.to_device(x)
    w2a8_linear(on_device, linear)
    cuda.synchronize()
    free, _ = usable_device().memory_info()
    for _ in range(200):
        w2a8_linear(on_device, linear)
    cuda.synchronize()
    assert usable_device().memory_info()[0] >= free - (8 << 20)
