"""Every kernel compiles for every architecture, without a GPU, into what its spec promises.

`make test` compiles each kernel's first variant for sm_90, and for other architectures where it does something else
there; `make slow-test` all variants, and the first ones for every architecture.

Checked in the PTX: no local memory (register arrays must stay in registers), as many dp4a and 16-byte loads as the spec
says. Where ptxas is installed (wheel nvidia-cuda-nvcc): it accepts the PTX, and spills nothing within the launch
bounds.
"""

import numbers
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from bitnet_numba.kernels.linear import gemm
from bitnet_numba.kernels.linear.heuristics import choose_tile
from bitnet_numba.kernels.runtime.compiler import compile_ptx
from bitnet_numba.kernels.runtime.spec import CARVEOUT, CARVEOUT_BYTES, RESERVED_BYTES, KernelSpec
from tests.kernels.cards import CARDS, specs_for, static_bytes
from tests.kernels.harness import ARCHITECTURES
from tests.kernels.variants import GROUPS, variants

FULL_ARCH = 90  # every variant is compiled for this architecture; for the others, the first of each kernel
OTHERS = (80, 75)  # what else `make test` compiles for: kernels of each other one are of the same form as those of one
# Where instructions come from, and what stands in for float8's where there are none.
INSTRUCTION_MODULES = ("bitnet_numba.kernels.ptx.", "bitnet_numba.kernels.attention.kv_dtype")
INSTRUCTIONS = (("linear_gemv", 75), ("linear_quantize_groups", 75))  # the cheapest that have all of sm_75's choices
NO_PTXAS = "ptxas is not installed (pip install nvidia-cuda-nvcc)"
KEPT_KERNELS = 8  # more than a group has that differ between architectures
SLACK_BYTES = 16  # of shared memory: arrays are aligned
# Kernel: an instruction that its PTX must have, and how often at least.
UNITS = {
    "decode_attention_mma": (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.b?f16", 32),
    "prefill_attention_wgmma": (r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.(bf16\.bf16|f16\.f16)", 4),
}
GEMM_UNITS = {  # the same of "gemm", by its tile's scheme and whether the architecture is at least sm_80
    ("dp4a", False): r"dp4a\.u32\.s32",
    ("mma", False): r"mma\.sync\.aligned\.m8n8k16\.row\.col\.s32\.u8\.s8",
    ("mma", True): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.u8\.s8",
    ("wgmma", True): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.u8\.s8",
}
# Architecture and kernel: bytes of spill stores and loads that are known, of two queries a key and of 256 threads.
SPILLS = {(arch, "paged_decode_attention"): 56 for arch in (80, 86, 87, 89, 100, 120)}
SPILLS[100, "decode_attention_mma"] = 8


def kernel_name(spec: KernelSpec) -> str:
    """The part of a name that a kernel's variants share."""
    return spec.name.split("[")[0]


def first_specs(group: str, arch: int) -> list[KernelSpec]:
    """One variant of each kernel of a group."""
    first: dict[str, KernelSpec] = {}
    for spec in GROUPS[group](arch):
        first.setdefault(kernel_name(spec), spec)
    return list(first.values())


def other_specs() -> dict[str, KernelSpec]:
    """The other variants, for FULL_ARCH, by name."""
    first = {spec.name for group in GROUPS for spec in first_specs(group, FULL_ARCH)}
    return {spec.name: spec for spec in variants(FULL_ARCH) if spec.name not in first}


def distinct_specs(group: str, arch: int) -> list[KernelSpec]:
    """Those of `first_specs` that do not only have other sizes and instructions than for FULL_ARCH or for those before
    this one in OTHERS; and some of other instructions, so that each is compiled."""
    if (group, arch) in INSTRUCTIONS:
        return first_specs(group, arch)
    before = (FULL_ARCH, *OTHERS[: OTHERS.index(arch)])
    known = {form(spec) for a in before for spec in first_specs(group, a)}
    return [spec for spec in first_specs(group, arch) if form(spec) not in known]


def fingerprint(value: Any, exact: bool = True) -> Any:
    """What Numba compiles a function from: its code and the constants in its closure. Equal for kernels that are built
    for two architectures and make the same choices; if not `exact`, also where these are numbers or instructions."""
    if not exact and str(getattr(value, "__module__", "")).startswith(INSTRUCTION_MODULES):
        return "instruction"
    value = getattr(value, "py_func", value)  # of a device function
    if isinstance(value, FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return value.__code__, fingerprint((cells, value.__defaults__), exact)
    if isinstance(value, tuple):
        return tuple(fingerprint(each, exact) for each in value)
    if not exact and isinstance(value, numbers.Real | np.number) and not isinstance(value, bool):
        return "number"
    return type(value), value, str(value)  # -0.0 equals 0.0


def form(spec: KernelSpec) -> Any:
    """Equal for variants that differ in sizes and instructions alone."""
    return kernel_name(spec), fingerprint(spec.kernel, exact=False), spec.signature


@pytest.fixture(scope="module", autouse=True)
def kernels_are_lowered_once() -> Iterator[None]:
    """Numba types and lowers a kernel once for all architectures that it is the same for, four fifths of the time;
    NVVM and ptxas then compile it for each."""
    from numba.cuda import compiler

    real, kept = compiler._compile_pyfunc_with_fixup, {}

    def lower(function: Any, signature: Any, **options: Any) -> Any:
        key = fingerprint(function), signature, *(options[name] for name in sorted(options) if name != "cc")
        if key not in kept:
            kept[key] = real(function, signature, **options)
            if len(kept) > KEPT_KERNELS:
                del kept[next(iter(kept))]
        return kept[key]

    lower.alone = real  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_compile_pyfunc_with_fixup", lower)
        yield


def unit(spec: KernelSpec, arch: int) -> tuple[str, int] | None:
    """The instruction that a variant is made for and how often it is there at least; None if it may have any."""
    if kernel_name(spec) != "gemm":
        return UNITS.get(kernel_name(spec))
    (scheme,) = {"dp4a", "mma", "wgmma"} & set(spec.name.split())
    return GEMM_UNITS[scheme, arch >= 80], 4


def ptx_of(spec: KernelSpec, arch: int) -> str:
    """PTX as a device would get it."""
    return compile_ptx(spec.kernel, spec.signature, arch, spec.threads, spec.blocks_per_sm, spec.registers)


@cache
def ptxas() -> Path | None:
    """The assembler that comes with the CUDA wheels."""
    return next(Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/ptxas"), None)


def check_spec(spec: KernelSpec, arch: int, folder: Path) -> None:
    """Compiles a variant and checks what came out."""
    ptx = ptx_of(spec, arch)
    target = re.search(rf"\.target (sm_{arch}a?)\b", ptx)  # a: instructions of this architecture alone
    assert target is not None
    assert not re.search(r"\b(ld|st)\.local", ptx), f"{spec.name} uses local memory"
    dp4a = len(re.findall(r"\bdp4a\.", ptx))
    assert dp4a >= spec.dp4a, f"{spec.name}: {dp4a} dp4a, {spec.dp4a} expected"
    wide = len(re.findall(r"\bld\.global\S*\.v4\.", ptx))
    assert wide >= spec.wide_loads, f"{spec.name}: {wide} 16-byte loads, {spec.wide_loads} expected"
    if (expected := unit(spec, arch)) is not None:
        pattern, least = expected
        assert len(re.findall(pattern, ptx)) >= least, f"{spec.name} has fewer than {least} {pattern}"
    if ptxas() is None:
        pytest.skip(NO_PTXAS)
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(ptxas()), f"-arch={target[1]}", "-v", "-o", str(folder / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{spec.name} for sm_{arch}: {done.stderr[-1000:]}"
    spilt = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spilt is not None and max(map(int, spilt.groups())) <= SPILLS.get((arch, kernel_name(spec)), 0), done.stderr
    assert "Potential Performance Loss" not in done.stderr, f"{spec.name} for sm_{arch}: {done.stderr}"
    found = re.search(r"(\d+) bytes smem", done.stderr)
    static = int(found[1]) if found else 0
    more = static - static_bytes(spec)  # less is right, too: arrays that a variant has no use for are left out
    assert more <= SLACK_BYTES, f"{spec.name} for sm_{arch}: {static} bytes of shared memory"
    if arch == FULL_ARCH and spec.carveout == CARVEOUT:
        shared = spec.shared + static
        assert spec.blocks_per_sm * (shared + RESERVED_BYTES) <= CARVEOUT_BYTES, (
            f"{spec.name}: {shared} bytes of shared memory"
        )
    if "wgmma." in ptx:  # a division becomes a subroutine, and around its call ptxas serialises wgmma
        assert not re.search(r"^\s*(div\.(rn\.)?f|call\b)", ptx, re.M), f"{spec.name} calls subroutines"


@pytest.mark.parametrize("group", GROUPS)
def test_every_kernel(group: str, tmp_path: Path) -> None:
    for spec in first_specs(group, FULL_ARCH):
        check_spec(spec, FULL_ARCH, tmp_path)


@pytest.mark.parametrize(
    ("group", "arch"), [(group, arch) for group in GROUPS for arch in OTHERS if distinct_specs(group, arch)]
)
def test_what_is_distinct_elsewhere(group: str, arch: int, tmp_path: Path) -> None:
    for spec in distinct_specs(group, arch):
        check_spec(spec, arch, tmp_path)


def test_nothing_is_distinct_on_the_newest_architecture() -> None:
    """Where this fails, OTHERS lacks an architecture."""
    newest = ARCHITECTURES[-1]
    for group in GROUPS:
        of_others = [spec for arch in (FULL_ARCH, *OTHERS) for spec in first_specs(group, arch)]
        known = {form(spec) for spec in of_others}
        assert {form(spec) for spec in first_specs(group, newest)} <= known, group


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != FULL_ARCH])
@pytest.mark.parametrize("group", GROUPS)
def test_every_architecture(group: str, arch: int, tmp_path: Path) -> None:
    for spec in first_specs(group, arch):
        check_spec(spec, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", other_specs())
def test_every_spec(name: str, tmp_path: Path) -> None:
    check_spec(other_specs()[name], FULL_ARCH, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted({card.arch for card in CARDS.values()}))
def test_every_spec_that_a_card_needs(arch: int, tmp_path: Path) -> None:
    for spec in specs_for(arch).values():
        check_spec(spec, arch, tmp_path)


def test_where_a_kernel_was_lowered_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def anonymous(ptx: str) -> str:
        """PTX without the numbers that Numba gives to functions and shared arrays."""
        numbers: dict[str, str] = {}
        return re.sub(r"_cudapy_smem_\d+|_Z\w+", lambda m: numbers.setdefault(m[0], f"n{len(numbers)}"), ptx)

    from numba.cuda import compiler

    (first,), (second,) = (first_specs("linear_quantize", arch) for arch in (90, 100))
    assert fingerprint(first.kernel) == fingerprint(second.kernel)
    ptx_of(first, 90)
    shared = ptx_of(second, 100)
    monkeypatch.setattr(compiler, "_compile_pyfunc_with_fixup", compiler._compile_pyfunc_with_fixup.alone)
    assert anonymous(ptx_of(second, 100)) == anonymous(shared)


def test_products_and_long_attention_use_the_units_made_for_them() -> None:
    gemv = first_specs("linear_gemv", FULL_ARCH)[0]
    assert gemv.dp4a >= 16 and gemv.wide_loads >= 1
    assert [kernel_name(spec) for spec in first_specs("attention_decode", 80)] == [
        "decode_attention",
        "decode_attention_mma",  # see UNITS
    ]
    assert [kernel_name(spec) for spec in first_specs("attention_decode", 75)] == ["decode_attention"]


@pytest.mark.parametrize(
    "arch, M, scheme", [(61, 8, "dp4a"), (75, 8, "mma"), (80, 512, "mma"), (90, 1024, "wgmma"), (100, 1024, "mma")]
)
def test_products_of_many_tokens_use_the_units_made_for_them(arch: int, M: int, scheme: str, tmp_path: Path) -> None:
    """Which `check_spec` finds in the machine code."""
    spec = gemm.spec(arch, choose_tile(M, 2560, 2560, arch, 132))
    assert unit(spec, arch) == (GEMM_UNITS[scheme, arch >= 80], 4)
    if arch == 61:  # of no group
        check_spec(spec, 75, tmp_path)  # the compiler's minimum


def test_names_are_unique() -> None:
    names = [spec.name for spec in variants(FULL_ARCH)]
    assert len(names) == len(set(names))
