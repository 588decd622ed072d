"""Streams by any of their protocols, and what the driver gets for a prepared launch. No device is needed."""

import ctypes
from typing import Any

import numpy as np
import pytest
from numba.cuda import types

from bitnet_numba.kernels.runtime import launch as launch_module
from bitnet_numba.kernels.runtime.driver import Stream, stream_handle
from bitnet_numba.kernels.runtime.launch import PreparedLaunch
from bitnet_numba.kernels.runtime.memory import DeviceView
from bitnet_numba.kernels.runtime.spec import KernelSpec

driver = pytest.importorskip("cuda.bindings.driver")


class Protocol:
    """Numba's, cuda.core's and our own streams."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x1234


class TorchLike:
    """PyTorch's: `cuda_stream` is the handle."""

    cuda_stream = 0x1234


class CupyLike:
    """CuPy's: `ptr` is the handle."""

    ptr = 0x1234


class TorchWithProtocol(Protocol):
    """The protocol comes first."""

    cuda_stream = 0x5678


class OwnStream(Stream):
    """Ours, without a driver."""

    def __init__(self) -> None:
        self.handle = driver.CUstream(0x1234)


STREAMS = [0x1234, driver.CUstream(0x1234), Protocol(), TorchLike(), CupyLike(), TorchWithProtocol(), OwnStream()]
NO_STREAMS = ["0x1234", 1.5, object(), (0, 0x1234)]


def name_of(stream: Any) -> str:
    return type(stream).__name__


@pytest.mark.parametrize("stream", STREAMS, ids=name_of)
def test_a_stream_by_any_protocol(stream: Any) -> None:
    assert int(stream_handle(stream)) == 0x1234


def test_none_is_the_legacy_default_stream() -> None:
    assert stream_handle(None) == 0


@pytest.mark.parametrize("stream", NO_STREAMS, ids=name_of)
def test_what_is_no_stream(stream: Any) -> None:
    with pytest.raises(ValueError, match=f"expected a CUDA stream, not {type(stream).__name__}"):
        stream_handle(stream)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the driver gets for each launch."""
    launches: list[dict[str, Any]] = []

    def launch(config: Any, function: Any, parameters: int, extra: int) -> tuple[Any]:
        assert (function, extra) == ("a function", 0)
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        launches.append(
            {
                "stream": int(config.hStream),
                "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                "block": (config.blockDimX, config.blockDimY, config.blockDimZ),
                "shared": config.sharedMemBytes,
                "attributes": [a.id.name.removeprefix("CU_LAUNCH_ATTRIBUTE_") for a in config.attrs],
                "parameters": pointers,
            }
        )
        return (driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(launch_module, "load_kernel", lambda spec, arch: "a function")
    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch)
    return launches


SPEC = KernelSpec("one[1]", lambda p: None, (types.CPointer(types.int32),), 96, shared=4096)


@pytest.mark.parametrize("stream", STREAMS, ids=name_of)
def test_a_launch_takes_a_stream_by_any_protocol(stream: Any, launched: list[dict[str, Any]]) -> None:
    launch = PreparedLaunch(SPEC, 7, [64], 90)
    launch(stream)
    launch(None)
    assert [given["stream"] for given in launched] == [0x1234, 0]


@pytest.mark.parametrize("stream", NO_STREAMS, ids=name_of)
def test_a_launch_refuses_what_is_no_stream(stream: Any, launched: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="expected a CUDA stream"):
        PreparedLaunch(SPEC, 7, [64], 90)(stream)
    assert not launched


def test_a_launch_has_its_sizes_and_attributes(launched: list[dict[str, Any]]) -> None:
    PreparedLaunch(SPEC, 7, [64], 90)(None)
    PreparedLaunch(SPEC, (7, 4), [64], 90, use_pdl=False)(None)
    PreparedLaunch(SPEC, (7, 4), [64], 80)(None)
    PreparedLaunch(SPEC._replace(cluster=2), (7, 4), [64], 90)(None)
    assert {(given["block"], given["shared"]) for given in launched} == {((96, 1, 1), 4096)}
    assert [given["grid"] for given in launched] == [(7, 1, 1), (7, 4, 1), (7, 4, 1), (7, 4, 1)]
    pdl = "PROGRAMMATIC_STREAM_SERIALIZATION"
    assert [given["attributes"] for given in launched] == [[pdl], [], [], [pdl, "CLUSTER_DIMENSION"]]


def test_a_launch_passes_arguments_as_the_kernel_takes_them(launched: list[dict[str, Any]]) -> None:
    array = DeviceView(1 << 40, 3, np.int32)
    signature = (types.CPointer(types.int32), types.CPointer(types.int8), types.none, types.int32, types.float32)
    spec, values = SPEC._replace(signature=(*signature, types.int64)), [array, 48, None, -5, 0.5, 1 << 33]
    launch = PreparedLaunch(spec, 1, values, 90)
    launch(None)
    kinds = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_int64]
    pointers = launched[0]["parameters"]
    assert [kind.from_address(pointers[n]).value for n, kind in enumerate(kinds)] == [
        1 << 40,
        *(value or 0 for value in values[1:]),
    ]


def test_a_wrong_number_of_arguments_is_an_error(launched: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"one\[1\] takes 1 arguments, not 2"):
        PreparedLaunch(SPEC, 7, [64, 64], 90)
