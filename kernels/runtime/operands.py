"""The check that every launcher makes of its operands."""

from typing import Any

from bitnet_numba.kernels.runtime.memory import DeviceArray, as_device_array


def checked(kernel: str, problem: str, **operands: tuple[Any, int, str]) -> list[Any]:
    """The operands as DeviceArrays, in their order; None stays None.

    operands: name=(array, elements that it must hold at least, dtypes that it may have, such as "float32 int32").
    Arrays are DeviceArrays or have `__cuda_array_interface__`. Raises ValueError in one line that names the kernel, the
    operand, what it is, and what `problem` (such as "a 2560 x 6912 product") takes.
    """
    arrays: list[DeviceArray | None] = []
    for name, (value, size, dtypes) in operands.items():
        if value is None:
            arrays.append(None)
            continue
        try:
            array = as_device_array(value)
        except ValueError as error:
            raise ValueError(f"{kernel}: {name}: {error}") from None
        if array.dtype.name not in dtypes.split():
            raise ValueError(f"{kernel}: {name} must be {' or '.join(dtypes.split())}, not {array.dtype}")
        if array.size < size:
            raise ValueError(f"{kernel}: {name} holds {array.size} elements, {problem} takes {size}")
        arrays.append(array)
    return arrays
