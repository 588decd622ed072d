"""The CUDA backend's own host code without a GPU.

A block of host memory plays the device's: addresses are real, copies are memmove, and a launch runs its kernel on the
arrays that its pointers lie in, in the simulator, or does nothing.
"""

import ctypes
from functools import partial
from typing import Any

import numpy as np
import pytest

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.ptx.tma import Boxes, SimulatedTensorMap
from bitnet_numba.kernels.runtime.device import CudaDevice
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceView
from tests.kernels.harness import ARCH

CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "intermediate_size": 48, "vocab_size": 300, "max_position_embeddings": 16,
}  # fmt: skip


class HostMemory:
    """Stands in for the driver: allocations inside one buffer, at their real addresses."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.fails_after: int | None = None  # so many more allocations; None: never

    def call(self, name: str, *arguments: Any) -> Any:
        """What `device.driver_call` would do."""
        if name in ("cuMemAlloc", "cuMemHostAlloc"):
            if self.fails_after is not None:
                self.fails_after -= 1
                if self.fails_after < 0:
                    raise BackendError(f"the CUDA driver refused {name}: CUDA_ERROR_OUT_OF_MEMORY")
            block = np.full(-(-arguments[0] // 16) * 16, 0xA5, np.uint8)
            self.blocks[block.ctypes.data] = block
            return block.ctypes.data
        if name == "cuMemHostGetDevicePointer":
            return arguments[0]
        if name == "cuMemsetD8":
            ctypes.memset(*arguments)
        elif name.startswith("cuMemcpy"):
            ctypes.memmove(*arguments[:3])
        elif name in ("cuMemFree", "cuMemFreeHost"):
            del self.blocks[int(arguments[0])]
        elif name == "cuMemGetInfo":
            return 1 << 30, 1 << 30
        elif name == "cuEventElapsedTime":
            return 0.5
        return 0

    def array(self, address: int, dtype: Any) -> np.ndarray:
        """The memory from an address to the end of its allocation."""
        start = max(block for block in self.blocks if block <= address)
        return self.blocks[start][address - start :].view(dtype)


class SimulatedDevice(CudaDevice):
    """A device of the simulator, its memory in `HostMemory`."""

    def __init__(self, memory: HostMemory):
        self.memory = memory
        self.arch, self.num_sms, self.name = ARCH, 2, "simulator"

    def activate(self) -> None:
        """Nothing to do."""

    def memory_info(self) -> tuple[int, int]:
        """Plenty."""
        return 1 << 30, 1 << 30

    def tensor_map(self, array: Any, boxes: Boxes) -> SimulatedTensorMap:
        return SimulatedTensorMap(self.memory.array(array.address, np.dtype(np.int32)), boxes)

    def launch(self, spec: Any, grid: Any, arguments: Any, use_pdl: bool = True) -> Any:
        assert len(arguments) == len(spec.signature)
        return partial(self._run, spec, grid, arguments)

    def _run(self, spec: Any, grid: Any, arguments: Any, stream: Any) -> None:
        from numba import cuda, types
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        from tests.kernels import simulator

        values = []
        for kind, argument in zip(spec.signature, arguments, strict=True):
            if isinstance(argument, SimulatedTensorMap):
                pass
            elif isinstance(kind, types.CPointer):
                dtype = np.dtype(str(kind.dtype))
                argument = FakeCUDAArray(self.memory.array(int(getattr(argument, "address", argument)), dtype))
            elif kind == types.float32:
                argument = np.float32(argument)
            values.append(argument)
        simulator.Block.of_clusters(spec.cluster)
        cuda.jit(spec.kernel)[grid, spec.threads, 0, spec.shared](*values)


class Replayed:
    """Stands in for a captured graph: runs its launches one after the other."""

    def __init__(self, launches: Any):
        self.launches = launches

    def replay(self, stream: Any) -> None:
        """Runs them."""
        for launch in self.launches:
            launch(None)

    def close(self) -> None:
        """Nothing to free."""


def host_memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Puts host memory in the place of a device's; launches remain to be stood in for."""
    from bitnet_numba.kernels.runtime import driver
    from bitnet_numba.kernels.runtime import memory as memory_module

    memory = HostMemory()
    for module in (driver, memory_module):
        monkeypatch.setattr(module, "driver_call", lambda *arguments: memory.call(*arguments))
    monkeypatch.setattr(driver, "_is_done", lambda query, handle: True)
    monkeypatch.setattr(driver.Stream, "capture", lambda self, launches: Replayed(launches))
    return memory


class IdleLaunch(Launch):
    """A launch that does nothing."""

    def __call__(self, stream: Any) -> None:
        """Does nothing."""


def idle_device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    """A device over host memory whose kernels do nothing: for what is done around them."""
    device = SimulatedDevice(host_memory(monkeypatch))
    device.l2_bytes = 1 << 12
    monkeypatch.setattr(device, "launch", lambda spec, grid, arguments, use_pdl=True: IdleLaunch(spec, arguments))
    monkeypatch.setattr(device, "tensor_map", lambda *arguments: DeviceView(0, 16, np.uint64))
    return device


def idle_backend(monkeypatch: pytest.MonkeyPatch, checkpoint: Any, kv_dtype: KVDtype = DEFAULT) -> Any:
    """A CudaBackend on an `idle_device`."""
    from bitnet_numba.backends.cuda import backend

    device = idle_device(monkeypatch)
    monkeypatch.setattr(backend, "usable_device", lambda: device)
    monkeypatch.setattr(backend, "load_specs", lambda *arguments, **options: 0)
    return backend.CudaBackend(checkpoint, kv_dtype)


def simulate(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Puts host memory and the simulator in the place of a device, with small tiles."""
    from bitnet_numba.kernels import embedding
    from bitnet_numba.kernels.attention import decode as attention
    from bitnet_numba.kernels.attention import kv_cache, prefill_wgmma
    from bitnet_numba.kernels.linear import gemm, gemm_groups, quantize
    from bitnet_numba.kernels.linear.tile import Tile
    from bitnet_numba.kernels.lm_head import gemm_mma, gemv, split_norm
    from bitnet_numba.kernels.sampling import single
    from tests.kernels import simulator

    simulator.install()
    memory = host_memory(monkeypatch)
    monkeypatch.setattr(single, "MAX_BLOCKS", 1)  # blocks run one after the other: none may wait for another
    monkeypatch.setattr(attention, "SHORT", attention.SHORT._replace(threads=64, unroll=2))  # fewer threads, for speed
    for name in ("embed_token_spec", "embed_tokens_spec", "gather_last_spec", "scale_spec", "column_blocks"):
        monkeypatch.setattr(embedding, name, partial(getattr(embedding, name), threads=32))
    monkeypatch.setattr(kv_cache, "append_spec", partial(kv_cache.append_spec, threads=32))
    monkeypatch.setattr(prefill_wgmma, "WARPS", 4)
    monkeypatch.setattr(prefill_wgmma, "KEYS", 16)
    monkeypatch.setattr(gemm, "choose_tile", lambda *arguments: Tile(8, 1, 4, 1, 0, 2, scheme="wgmma"))
    monkeypatch.setattr(gemm_groups, "choose_group_tile", lambda *arguments: Tile(8, 2, 1, 2, 1, 2))
    monkeypatch.setattr(gemv, "spec", partial(gemv.spec, threads=128))
    monkeypatch.setattr(gemm_mma, "spec", partial(gemm_mma.spec, threads=64))
    monkeypatch.setattr(split_norm, "spec", partial(split_norm.spec, threads=64))
    monkeypatch.setattr(quantize, "quantize_spec", partial(quantize.quantize_spec, threads=32))
    return memory


def simulated_backend(monkeypatch: pytest.MonkeyPatch, checkpoint: Any, kv_dtype: KVDtype = DEFAULT) -> Any:
    """A CudaBackend over host memory and the simulator."""
    from bitnet_numba.backends.cuda import backend, context, prompts

    memory = simulate(monkeypatch)
    monkeypatch.setattr(backend, "usable_device", lambda: SimulatedDevice(memory))
    monkeypatch.setattr(backend, "load_specs", lambda *arguments, **options: 0)
    monkeypatch.setattr(context, "STEPS_AHEAD", 1)
    monkeypatch.setattr(prompts, "MIN_TOKENS", 2)
    return backend.CudaBackend(checkpoint, kv_dtype)
