"""Cards that most people have and that nobody here could measure, and what models would launch on them.

Numbers of SMs are those of NVIDIA's data sheets, limits of an SM those of the CUDA C++ Programming Guide ("Compute
Capabilities").
"""

import inspect
import re
from dataclasses import replace
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import pytest

from bitnet_numba.backends.cuda import warmup
from bitnet_numba.backends.cuda.weights import RowFormats
from bitnet_numba.checkpoint.packed import RowFormat
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec
from tools.make_checkpoint import PRESETS, QUANTIZATION

STATIC_BYTES = 48 * 1024  # of shared memory that a block can have without asking, on any card


class SM(NamedTuple):
    """Limits of an SM, all of which have 65536 registers."""

    threads: int
    blocks: int
    shared: int  # KB of shared memory
    block_shared: int  # KB of it that a block can have
    reserved: int  # bytes of it that the system takes for each block


SMS = {
    75: SM(1024, 16, 64, 64, 0),
    80: SM(2048, 32, 164, 163, 1024),
    86: SM(1536, 16, 100, 99, 1024),
    87: SM(1536, 16, 164, 163, 1024),
    89: SM(1536, 24, 100, 99, 1024),
    90: SM(2048, 32, 228, 227, 1024),
    100: SM(2048, 32, 228, 227, 1024),
    120: SM(1536, 24, 100, 99, 1024),
}
CARDS = {
    "RTX 2060": ArchSpec(75, 30), "T4": ArchSpec(75, 40), "GTX 1650": ArchSpec(75, 14),
    "A100": ArchSpec(80, 108), "A100, a seventh of it by MIG": ArchSpec(80, 14),
    "RTX 3060": ArchSpec(86, 28), "RTX 3090": ArchSpec(86, 82), "A2": ArchSpec(86, 10),
    "Orin": ArchSpec(87, 16), "Orin Nano": ArchSpec(87, 8),
    "RTX 4060": ArchSpec(89, 24), "L4": ArchSpec(89, 58), "RTX 4090": ArchSpec(89, 128),
    "H100 PCIe": ArchSpec(90, 114), "H200": ArchSpec(90, 132),
    "B200": ArchSpec(100, 148),
    "RTX 5060": ArchSpec(120, 30), "RTX 5090": ArchSpec(120, 170),
}  # fmt: skip
# Two kinds of block, head sizes of 128 and 256, group scales; rows of embedding and head as they are kept by default.
MODELS: dict[str, RowFormat] = {
    "2b-4t": "bf16", "falcon3-3b": "bf16", "falcon3-7b": "int8", "bonsai-1.7b": "ternary", "bonsai-8b": "ternary",
}  # fmt: skip
MAX_SEQUENCES = 512


class RecordingDevice(DryRunDevice):
    """A dry run that keeps grids, too."""

    last: "RecordingDevice"

    def __init__(self, arch: int, num_sms: int):
        super().__init__(arch, num_sms)
        self.launches: dict[tuple[str, tuple[int, int]], KernelSpec] = {}
        RecordingDevice.last = self

    def launch(self, spec: KernelSpec, grid: Any, arguments: Any, use_pdl: bool = True) -> Launch:
        self.launches[spec.name, grid if isinstance(grid, tuple) else (grid, 1)] = spec
        return super().launch(spec, grid, arguments, use_pdl)


def model_config(name: str) -> ModelConfig:
    """Of a model of MODELS."""
    weight_format, raw = PRESETS[name]
    if weight_format in QUANTIZATION:
        raw = raw | {"quantization_config": QUANTIZATION[weight_format]}
    return replace(ModelConfig.from_hf(raw), num_layers=1)


@cache
def launches(model: str, arch: int, num_sms: int) -> list[tuple[KernelSpec, tuple[int, int]]]:
    """Specs and grids of a model's steps, prompts of all sizes and batches of up to MAX_SEQUENCES sequences."""
    rows = RowFormats(MODELS[model], MODELS[model])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "DryRunDevice", RecordingDevice)
        warmup.Needs(model_config(model), rows, ArchSpec(arch, num_sms), MAX_SEQUENCES, both=True).specs()
    return [(spec, grid) for (_, grid), spec in RecordingDevice.last.launches.items()]


def specs_for(arch: int) -> dict[str, KernelSpec]:
    """What the models need on the cards of an architecture, by name."""
    cards = [card for card in CARDS.values() if card.arch == arch]
    return {spec.name: spec for card in cards for model in MODELS for spec, _ in launches(model, arch, card.num_sms)}


def static_bytes(spec: KernelSpec) -> int:
    """Static shared memory of a block: what the kernel's source declares, with the constants of its closure. The tests
    of machine code hold that the assembler says the same."""
    function = getattr(spec.kernel, "py_func", spec.kernel)
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    constants = function.__globals__ | dict(zip(function.__code__.co_freevars, cells, strict=True))
    arrays = _shared_arrays(function.__code__)
    return sum(int(eval(size, constants)) * np.dtype(dtype).itemsize for size, dtype in arrays)  # noqa: S307


@cache
def _shared_arrays(code: CodeType) -> list[tuple[str, str]]:
    """Sizes and types of the shared arrays that a kernel makes, as its source has them."""
    return re.findall(r"cuda\.shared\.array\(\s*([^,]+),\s*(\w+)", inspect.getsource(code))
