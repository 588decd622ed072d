"""Every kernel compiles for every architecture, without a GPU, into what its module promises.

Checked in the PTX: no local memory (register arrays must stay in registers), as many dp4a and 16-byte loads as the
form says. Where ptxas is installed (wheel nvidia-cuda-nvcc): it accepts the PTX, and spills nothing within the launch
bounds.
"""

import re
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from bitnet_numba.kernels.linear import gemm as w2a8_matmul
from bitnet_numba.kernels.linear import heuristics
from bitnet_numba.kernels.runtime.compiler import compile_ptx
from bitnet_numba.kernels.runtime.spec import CARVEOUT, CARVEOUT_BYTES, RESERVED_BYTES, KernelSpec
from tests.kernels.harness import ARCHITECTURES
from tests.kernels.variants import GROUPS, variants

FULL_ARCH = 90  # the architecture that every form is compiled for; the others get each module's first forms
TENSOR_CORES = 80
NO_PTXAS = "ptxas is not installed (pip install nvidia-cuda-nvcc)"


def first_specs(group: str, arch: int) -> list[KernelSpec]:
    """One variant of each kernel of a group."""
    seen: dict[str, KernelSpec] = {}
    for spec in GROUPS[group](arch):
        seen.setdefault(spec.name.split("[")[0], spec)
    return list(seen.values())


@cache
def ptxas() -> Path | None:
    """The assembler that comes with the CUDA wheels."""
    return next(Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/ptxas"), None)


def check_spec(spec: KernelSpec, arch: int, folder: Path) -> None:
    """Compiles a form and checks what came out."""
    ptx = compile_ptx(spec.kernel, spec.signature, arch, spec.threads, spec.blocks_per_sm)
    target = re.search(rf"\.target (sm_{arch}a?)\b", ptx)  # a: instructions of this very architecture
    assert target is not None
    assert not re.search(r"\b(ld|st)\.local", ptx), f"{spec.name} uses local memory"
    dp4a = len(re.findall(r"\bdp4a\.", ptx))
    assert dp4a >= spec.dp4a, f"{spec.name}: {dp4a} dp4a, {spec.dp4a} expected"
    wide = len(re.findall(r"\bld\.global\S*\.v4\.", ptx))
    assert wide >= spec.wide_loads, f"{spec.name}: {wide} 16-byte loads, {spec.wide_loads} expected"
    if ptxas() is None:
        pytest.skip(NO_PTXAS)
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(ptxas()), f"-arch={target[1]}", "-v", "-o", str(folder / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{spec.name} for sm_{arch}: {done.stderr[-1000:]}"
    assert " 0 bytes spill stores, 0 bytes spill loads" in done.stderr, f"{spec.name} for sm_{arch}: {done.stderr}"
    assert "Potential Performance Loss" not in done.stderr, f"{spec.name} for sm_{arch}: {done.stderr}"
    if arch == FULL_ARCH and spec.carveout == CARVEOUT:
        static = re.search(r"(\d+) bytes smem", done.stderr)
        shared = spec.shared + (int(static[1]) if static else 0)
        assert spec.blocks_per_sm * (shared + RESERVED_BYTES) <= CARVEOUT_BYTES, (
            f"{spec.name}: {shared} bytes of shared memory"
        )
    if "wgmma." in ptx:  # the linker makes a subroutine of a division, and around its call wgmma runs one at a time
        assert not re.search(r"^\s*(div\.(rn\.)?f|call\b)", ptx, re.M), f"{spec.name} calls subroutines"
    assert re.search(r"\b0 bytes stack frame", done.stderr), f"{spec.name} for sm_{arch}: {done.stderr}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_architecture(group: str, arch: int, tmp_path: Path) -> None:
    for spec in first_specs(group, arch):
        check_spec(spec, arch, tmp_path)


@pytest.mark.parametrize(
    "group, name",
    [
        (group, spec.name)
        for group in GROUPS
        for spec in GROUPS[group](FULL_ARCH)
        if spec.name not in {first.name for first in first_specs(group, FULL_ARCH)}
    ],
)
def test_every_spec(group: str, name: str, tmp_path: Path) -> None:
    spec = next(spec for spec in GROUPS[group](FULL_ARCH) if spec.name == name)
    check_spec(spec, FULL_ARCH, tmp_path)


def test_products_and_long_attention_use_the_units_made_for_them() -> None:
    gemv = first_specs("linear_gemv", FULL_ARCH)[0]
    assert gemv.dp4a >= 16 and gemv.wide_loads >= 1
    assert [spec.name.split("[")[0] for spec in first_specs("attention_decode", TENSOR_CORES)] == [
        "decode_attention",
        "decode_attention_mma",
    ]
    assert [spec.name.split("[")[0] for spec in first_specs("attention_decode", 75)] == ["decode_attention"]
    long = first_specs("attention_decode", TENSOR_CORES)[1]
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
    spec = w2a8_matmul.spec(arch, heuristics.plan(M, 2560, 2560, arch, 132))
    compiled_for = max(arch, 75)  # the least that the compiler knows
    ptx = compile_ptx(spec.kernel, spec.signature, compiled_for, spec.threads, spec.blocks_per_sm)
    assert len(re.findall(unit, ptx)) >= 4


def test_names_are_unique() -> None:
    names = [spec.name for spec in variants(FULL_ARCH)]
    assert len(names) == len(set(names))
