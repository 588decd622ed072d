"""Other libraries' device arrays by `__cuda_array_interface__`. No device is needed: nothing is read."""

from typing import Any

import numpy as np
import pytest

from bitnet_numba.kernels.runtime.memory import DeviceView, as_device_array

ADDRESS = 0x7F0000000000


class Foreign:
    """An array of another library."""

    def __init__(self, shape: Any, typestr: str = "<f4", address: int | None = ADDRESS, **more: Any):
        read_only = more.pop("read_only", False)
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (address, read_only), "version": 3, **more
        }  # fmt: skip


@pytest.mark.parametrize(
    "array, size, dtype",
    [
        (Foreign((6,)), 6, "float32"),
        (Foreign((2, 3), "<i4"), 6, "int32"),
        (Foreign([2, 3], "|i1"), 6, "int8"),
        (Foreign((2, 3), "<u2", strides=None), 6, "uint16"),
        (Foreign((2, 3), strides=(12, 4)), 6, "float32"),
        (Foreign((4, 1, 3), strides=(12, 999, 4)), 12, "float32"),
        (Foreign((1, 5), strides=(0, 4)), 5, "float32"),
        (Foreign((), "<f8"), 1, "float64"),
        (Foreign((), "<f8", strides=()), 1, "float64"),
        (Foreign((6,), read_only=True), 6, "float32"),
        (Foreign((6,), stream=1), 6, "float32"),
    ],
    ids=[
        "flat", "two dimensions", "a list as shape", "strides None", "contiguous strides", "a stride that is not used",
        "a broadcast axis of one", "0-d", "0-d with strides", "read-only", "with a stream",
    ],
)  # fmt: skip
def test_contiguous_arrays_are_taken_flat(array: Foreign, size: int, dtype: str) -> None:
    view = as_device_array(array)
    assert (view.address, view.size, view.dtype) == (ADDRESS, size, np.dtype(dtype))
    assert view.nbytes == size * np.dtype(dtype).itemsize
    assert isinstance(view, DeviceView) and view.owner is array
    view.close()  # which frees nothing
    assert view.address == ADDRESS


@pytest.mark.parametrize("shape, strides", [((0,), None), ((3, 0), (0, 4)), ((0, 5), (7, 7))])
@pytest.mark.parametrize("address", [0, None, ADDRESS])
def test_arrays_without_elements_may_have_no_address(shape: Any, strides: Any, address: int | None) -> None:
    view = as_device_array(Foreign(shape, address=address, strides=strides))
    assert (view.address, view.size, view.nbytes) == (address or 0, 0, 0)


@pytest.mark.parametrize(
    "shape, strides",
    [((6,), (8,)), ((2, 3), (4, 8)), ((2, 3), (16, 4)), ((2, 3), (0, 4)), ((6,), (-4,)), ((2, 1, 3), (24, 12, 4))],
    ids=["every other", "Fortran order", "padded rows", "broadcast", "reversed", "every other row"],
)
def test_strided_arrays_are_refused(shape: Any, strides: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(.*\) and strides \(.*\) is not contiguous") as caught:
        as_device_array(Foreign(shape, strides=strides))
    assert f"shape {shape} and strides {strides}" in str(caught.value)


@pytest.mark.parametrize("array", [np.zeros(3), [1, 2], 5, None, "words"], ids=lambda array: type(array).__name__)
def test_what_is_not_in_device_memory_is_refused(array: Any) -> None:
    with pytest.raises(ValueError, match=f"expected an array in device memory, not {type(array).__name__}"):
        as_device_array(array)


def test_our_own_arrays_stay_as_they_are() -> None:
    array = DeviceView(ADDRESS, 5, np.int8)
    assert as_device_array(array) is array


def test_our_own_arrays_have_the_interface() -> None:
    array = DeviceView(ADDRESS, 5, np.uint16)
    expected = {"shape": (5,), "typestr": "<u2", "data": (ADDRESS, False), "version": 3}
    assert array.__cuda_array_interface__ == expected

    class Borrowed:
        __cuda_array_interface__ = expected

    again = as_device_array(Borrowed())
    assert (again.address, again.size, again.dtype) == (array.address, array.size, array.dtype)
