"""Why there is no device, in one line; and dry runs, which need none."""

from typing import Any

import numpy as np
import pytest

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.linear.gemv import gemv
from bitnet_numba.kernels.linear.operands import PackedLinear
from bitnet_numba.kernels.lm_head.gemv import lm_head_gemv
from bitnet_numba.kernels.operands import EmbeddingTable, Norm
from bitnet_numba.kernels.ptx.tma import Boxes
from bitnet_numba.kernels.runtime import device as device_module
from bitnet_numba.kernels.runtime.compiler import compile_ptx
from bitnet_numba.kernels.runtime.device import CudaDevice, DryRunDevice, usable_device
from bitnet_numba.packing import packed_words
from tests.kernels.harness import why_no_gpu

driver = pytest.importorskip("cuda.bindings.driver")


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU")
def test_without_a_device_there_is_a_reason_in_one_line() -> None:
    from bitnet_numba.backends.cuda.backend import why_unusable

    reason = why_unusable()
    assert reason and "\n" not in reason
    with pytest.raises(BackendError) as caught:
        usable_device()
    assert str(caught.value) == reason


def no_library(flags: int) -> Any:
    raise RuntimeError("Failed to dlopen libcuda.so.1")


@pytest.mark.parametrize(
    "start, count, reason",
    [
        (no_library, 0, "no NVIDIA driver is installed"),
        (lambda flags: (driver.CUresult.CUDA_ERROR_NO_DEVICE,), 0, "no CUDA device is present"),
        (lambda flags: (driver.CUresult.CUDA_SUCCESS,), 0, "no CUDA device is present"),
        (
            lambda flags: (driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,), 0,
            "the NVIDIA driver does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        ),
    ],
    ids=["no library", "no device", "none to be seen", "it does not start"],
)  # fmt: skip
def test_each_reason(start: Any, count: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "cuInit", start)
    monkeypatch.setattr(driver, "cuDeviceGetCount", lambda: (driver.CUresult.CUDA_SUCCESS, count))
    with pytest.raises(BackendError) as caught:
        usable_device.__wrapped__()
    assert str(caught.value) == reason


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def driver_call(name: str, *arguments: Any) -> Any:
        if name == "cuDeviceGetAttribute":
            return {"MAJOR": 5, "MINOR": 2}.get(arguments[0].name.rpartition("_")[2], 10)
        return b"An old card\0\0" if name == "cuDeviceGetName" else 0

    monkeypatch.setattr(device_module, "driver_call", driver_call)
    with pytest.raises(BackendError, match=r"An old card has compute capability 5\.2; at least 6\.1 is needed"):
        CudaDevice(0)


def test_a_dry_run_records_the_kernels_of_its_launches() -> None:
    device = DryRunDevice(90, 132)
    N, K, vocab_size = 96, 320, 50
    linear = PackedLinear(device.array(np.zeros(packed_words(N, K), np.int32)), device.zeros(1, np.float32), (N,), K)
    table = EmbeddingTable(device.empty(vocab_size * K, np.uint16), None, vocab_size, K, "bf16")
    norm = Norm(device.empty(K, np.float32), 1e-5)
    x, out, logits = (device.empty(size, np.float32) for size in (K, N, vocab_size))
    first = lm_head_gemv(device, table, x, norm, logits)
    second = gemv(device, linear, x, out, norm=norm)
    assert gemv(device, linear, x, out, norm=norm).name == second.name
    assert [spec.name for spec in device.specs] == [first.name, second.name], "each once, in order"
    spec = device.specs[0]  # one of them is enough: it takes seconds
    assert ".entry kernel(" in compile_ptx(spec.kernel, spec.signature, 90, spec.threads, spec.blocks_per_sm)
    with pytest.raises(ValueError, match="out holds 95 elements"):
        gemv(device, linear, x, device.empty(N - 1, np.float32), norm=norm)
    assert device.specs[2:] == []
    with pytest.raises(NotImplementedError):
        first(None)


def test_arrays_of_a_dry_run_have_sizes_and_no_memory() -> None:
    device = DryRunDevice(80, 108)
    assert (device.arch, device.num_sms, device.specs) == (80, 108, [])
    arrays = [device.empty(12, np.int32), device.zeros(12, np.int32), device.array(np.zeros((3, 4), np.int32))]
    for array in arrays:
        assert (array.size, array.dtype, array.nbytes, array.address) == (12, np.dtype(np.int32), 48, 0)
        array.close()
    assert device.tensor_map(arrays[0], Boxes.of_matrix(3, 4, 3, 4)).nbytes == 128
