"""Every kernel compiles for every architecture, without a GPU, into what its module promises.

Checked in the PTX: no local memory (register arrays must stay in registers), as many dp4a and 16-byte loads as the
form says. Where ptxas is installed (wheel nvidia-cuda-nvcc): it accepts the PTX, and spills nothing within the launch
bounds.
"""

import re
import subprocess
import sysconfig
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from bitnet_numba.kernels import w2a8_matmul
from bitnet_numba.kernels.compilation import compile_ptx
from bitnet_numba.kernels.forms import CARVED_BYTES, CARVEOUT, SYSTEM_BYTES, KernelForm
from tests.kernel_harness import ARCHITECTURES

MODULES = (
    "attention",
    "attention_batch",
    "attention_prompt",
    "attention_rows",
    "decode",
    "embed",
    "head",
    "head_many",
    "head_warpgroup",
    "kv_cache",
    "norm_quant",
    "sampler",
    "sampler_many",
    "w2a8_gemv",
    "w2a8_matmul",
)
MOST_COMMON = 90  # the architecture that every form is compiled for; the others get each module's first forms
TENSOR_CORES = 80
NO_PTXAS = "ptxas is not installed (pip install nvidia-cuda-nvcc)"


def forms_of(module: str, arch: int) -> list[KernelForm]:
    """A module's forms; making them compiles nothing."""
    kernels = import_module(f"bitnet_numba.kernels.{module}")
    return [kernels.advance_form(arch)] if module == "decode" else kernels.forms(arch)


def first_forms(module: str, arch: int) -> list[KernelForm]:
    """One form of each kernel of a module."""
    seen: dict[str, KernelForm] = {}
    for form in forms_of(module, arch):
        seen.setdefault(form.name.split("[")[0], form)
    return list(seen.values())


@cache
def ptxas() -> Path | None:
    """The assembler that comes with the CUDA wheels."""
    return next(Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/ptxas"), None)


def check_form(form: KernelForm, arch: int, folder: Path) -> None:
    """Compiles a form and checks what came out."""
    ptx = compile_ptx(form.kernel, form.signature, arch, form.threads, form.blocks_per_sm)
    target = re.search(rf"\.target (sm_{arch}a?)\b", ptx)  # a: instructions of this very architecture
    assert target is not None
    assert not re.search(r"\b(ld|st)\.local", ptx), f"{form.name} uses local memory"
    dp4a = len(re.findall(r"\bdp4a\.", ptx))
    assert dp4a >= form.dp4a, f"{form.name}: {dp4a} dp4a, {form.dp4a} expected"
    wide = len(re.findall(r"\bld\.global\S*\.v4\.", ptx))
    assert wide >= form.wide_loads, f"{form.name}: {wide} 16-byte loads, {form.wide_loads} expected"
    if ptxas() is None:
        pytest.skip(NO_PTXAS)
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(ptxas()), f"-arch={target[1]}", "-v", "-o", str(folder / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{form.name} for sm_{arch}: {done.stderr[-1000:]}"
    assert " 0 bytes spill stores, 0 bytes spill loads" in done.stderr, f"{form.name} for sm_{arch}: {done.stderr}"
    assert "Potential Performance Loss" not in done.stderr, f"{form.name} for sm_{arch}: {done.stderr}"
    if arch == MOST_COMMON and form.carveout == CARVEOUT:
        static = re.search(r"(\d+) bytes smem", done.stderr)
        shared = form.shared + (int(static[1]) if static else 0)
        assert form.blocks_per_sm * (shared + SYSTEM_BYTES) <= CARVED_BYTES, (
            f"{form.name}: {shared} bytes of shared memory"
        )
    if "wgmma." in ptx:  # the linker makes a subroutine of a division, and around its call wgmma runs one at a time
        assert not re.search(r"^\s*(div\.(rn\.)?f|call\b)", ptx, re.M), f"{form.name} calls subroutines"
    assert re.search(r"\b0 bytes stack frame", done.stderr), f"{form.name} for sm_{arch}: {done.stderr}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_every_architecture(module: str, arch: int, tmp_path: Path) -> None:
    for form in first_forms(module, arch):
        check_form(form, arch, tmp_path)


@pytest.mark.parametrize(
    "module, name",
    [
        (module, form.name)
        for module in MODULES
        for form in forms_of(module, MOST_COMMON)
        if form.name not in {first.name for first in first_forms(module, MOST_COMMON)}
    ],
)
def test_every_form(module: str, name: str, tmp_path: Path) -> None:
    form = next(form for form in forms_of(module, MOST_COMMON) if form.name == name)
    check_form(form, MOST_COMMON, tmp_path)


def test_products_and_long_attention_use_the_units_made_for_them() -> None:
    gemv = first_forms("w2a8_gemv", MOST_COMMON)[0]
    assert gemv.dp4a >= 16 and gemv.wide_loads >= 1
    assert [form.name.split("[")[0] for form in first_forms("attention", TENSOR_CORES)] == [
        "attention",
        "attention_long",
    ]
    assert [form.name.split("[")[0] for form in first_forms("attention", 75)] == ["attention"]
    long = first_forms("attention", TENSOR_CORES)[1]
    ptx = compile_ptx(long.kernel, long.signature, TENSOR_CORES, long.threads, long.blocks_per_sm)
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16", ptx)) >= 32


@pytest.mark.parametrize(
    "arch, M, unit",
    [
        (61, 8, r"dp4a\.u32\.s32"),
        (75, 8, r"mma\.sync\.aligned\.m8n8k16\.row\.col\.s32\.u8\.s8"),
        (80, 512, r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.u8\.s8"),
        (90, 1024, r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.u8\.s8"),
        (100, 1024, r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.u8\.s8"),
    ],
)
def test_products_of_many_tokens_use_the_units_made_for_them(arch: int, M: int, unit: str) -> None:
    form = w2a8_matmul.form(arch, w2a8_matmul.plan(M, 2560, 2560, arch, 132))
    compiled_for = max(arch, 75)  # the least that the compiler knows
    ptx = compile_ptx(form.kernel, form.signature, compiled_for, form.threads, form.blocks_per_sm)
    assert len(re.findall(unit, ptx)) >= 4


def test_names_are_unique() -> None:
    names = [form.name for module in MODULES for form in forms_of(module, MOST_COMMON)]
    assert len(names) == len(set(names))
