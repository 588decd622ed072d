"""What a machine has for a backend, found out in a process of its own: `-m bitnet_numba.cli.probe cpu` or `cuda`.

A broken compiler or driver may end the process that loads it; then only this one ends. The answer is a line of JSON.
"""

import contextlib
import ctypes
import json
import re
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

from bitnet_numba.errors import BackendError, one_line


def cpu() -> dict[str, Any]:
    """Instruction sets, threads, and how many of the built-in model's kernels are compiled."""
    from bitnet_numba.backends.cores import usable_cores
    from bitnet_numba.backends.cpu.warmup import Needs
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.engine.loading import DEMO
    from bitnet_numba.kernels.cpu import isa, step

    found: dict[str, Any] = {"instruction_sets": isa.available(), "threads": usable_cores()}
    try:
        found["instruction_set"] = isa.choose().name
    except BackendError as error:  # $BITNET_NUMBA_ISA asks for one that is not there
        return found | {"problem": one_line(error)}
    checkpoint = open_packed(DEMO)
    kernels = Needs.of(checkpoint, found["instruction_set"]).kernels().values()
    found["kernels"] = len(kernels) + 1
    found["kernels_cached"] = sum(kernel.is_cached for kernel in kernels) + step.is_cached()
    return found


def cuda() -> dict[str, Any]:
    """Driver, cards, the extra that fits the driver, and why CUDA cannot be used (None if it can)."""
    found: dict[str, Any] = {"driver": driver_version(), "cuda": None, "cards": [], "extra": None}
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        problem = "there is no NVIDIA driver"
        if found["driver"] is not None:
            problem = "the kernel has an NVIDIA driver, but its library libcuda.so.1 is missing"
        return found | {"problem": problem}
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    major, minor = version.value // 1000, version.value % 1000 // 10
    found["cuda"] = f"{major}.{minor}"
    if major < 12:
        return found | {"problem": f"the driver is for CUDA {major}.{minor}; CUDA 12 or newer is needed"}
    found["extra"] = "cuda12" if major == 12 else "cuda13"
    status = driver.cuInit(0)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        return found | {"problem": f"the driver cannot start: {(text.value or b'').decode()} (error {status})"}
    found["cards"] = cards(driver)
    if util.find_spec("numba_cuda") is None or util.find_spec("cuda") is None:
        return found | {"problem": "the CUDA packages are not installed"}
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        bindings = int(metadata.version("cuda-bindings").partition(".")[0])
        if bindings > major:
            return found | {"problem": f"the CUDA packages are for CUDA {bindings}, the driver is for CUDA {major}"}
    from bitnet_numba.backends.cuda.backend import why_unusable

    return found | {"problem": why_unusable()}


def cards(driver: Any) -> list[dict[str, Any]]:
    """Name, compute capability and memory of each card, from the driver's library."""
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for number in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            value = ctypes.c_int()
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(str(value.value))
        found.append(
            {"name": name.value.decode(errors="replace"), "sm": "".join(capability), "memory_bytes": memory.value}
        )
    return found


def driver_version(path: str = "/proc/driver/nvidia/version") -> str | None:
    """The version of the kernel's NVIDIA driver, such as 580.65.06; None if it is not known."""
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]+)", Path(path).read_text(errors="replace"))
        if match:
            return match[1]
    return None


if __name__ == "__main__":
    try:
        answer = {"cpu": cpu, "cuda": cuda}[sys.argv[1]]()
    except Exception as error:
        answer = {"problem": one_line(error)}
    print(json.dumps(answer))
