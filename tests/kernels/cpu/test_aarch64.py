"""The kernels' machine code for AArch64, whatever machine this is: dot products of bytes, and no spills in inner loops.

A process of its own makes Numba lower kernels for ARM's instruction sets and stop at LLVM IR, since LLVM would abort at
another machine's instructions. The IR is then optimised and compiled for several CPUs.
"""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import pytest

ROOT = Path(__file__).parents[3]
TRIPLE = "aarch64-unknown-linux-gnu"
KERNELS = ("gemm", "head", "gemv", "gemv_groups", "gemm_groups")
LABEL = re.compile(r"^(\.L\w+):")
BRANCH = re.compile(r"^\t(?:b|b\.\w+|cbn?z|tbn?z)\t(?:.*, )?(\.L\w+)$")

LOWER = """
import sys
from numba import njit
from numba.core import types
from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary, JITCPUCodegen

CPUCodeLibrary._optimize_functions = lambda library, module: None
CPUCodeLibrary._optimize_final_module = lambda library: None
JITCodeLibrary._finalize_specific = lambda library: None
JITCodeLibrary.get_pointer_to_function = lambda library, name: library._ensure_finalized() or 1
JITCPUCodegen._add_module = lambda codegen, module: None
JITCPUCodegen.set_env = lambda codegen, name, env: None

from bitnet_numba.kernels.cpu import gemm, gemm_groups, gemv, gemv_groups, isa, lm_head, vec

def gemm_kernel(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last, scratch):
    gemm.gemm(isa, words, K, q, q_stride, q_sums, M, acc, acc_stride, first, last, scratch)

def int8_kernel(isa, rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last):
    lm_head.head_int8(isa, rows, K, scales, sums, x, x_stride, M, y, y_stride, first, last)

def gemv_kernel(isa, words, K, q, q_sum, acc, first, last):
    gemv.gemv(isa, words, K, q, q_sum, acc, first, last)

def gemv_groups_kernel(isa, words, scales, K, q, d, offsets, y, first, last):
    gemv_groups.gemv_groups(isa, words, scales, K, q, d, offsets, y, first, last)

def gemm_groups_kernel(isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last, scratch):
    gemm_groups.gemm_groups(
        isa, words, scales, K, q, q_stride, d, offsets, stride, M, y, y_stride, first, last, scratch
    )

for name in ("i8mm", "dotprod"):
    for function, count in (
        (gemm_kernel, 11), (int8_kernel, 11), (gemv_kernel, 7), (gemv_groups_kernel, 9), (gemm_groups_kernel, 14)
    ):
        kernel = njit(**vec.OPTIONS)(function)
        kernel.compile((isa.InstructionSetType(name), *[types.int64] * count))
        print(*kernel.inspect_llvm().values(), end="\\0")
"""


@cache
def lowered() -> dict[tuple[str, str], str]:
    """LLVM IR of kernels, by instruction set and name."""
    done = subprocess.run([sys.executable, "-c", LOWER], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    kinds = [(isa, kernel) for isa in ("i8mm", "dotprod") for kernel in KERNELS]
    return dict(zip(kinds, done.stdout.split("\0"), strict=False))


def assembly(ir: str, cpu: str) -> list[str]:
    """The lines of a kernel's machine code for a CPU."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        pytest.skip("this LLVM does not compile for AArch64")
    machine = target.create_target_machine(cpu=cpu, opt=3)
    ir = re.sub('target triple = "[^"]*"', f'target triple = "{TRIPLE}"', ir)
    ir = re.sub('target datalayout = "[^"]*"', f'target datalayout = "{machine.target_data}"', ir)
    module = llvm.parse_assembly(ir)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module).splitlines()


def inner_loops(lines: list[str]) -> list[list[str]]:
    """The lines of each innermost loop: from a label to a branch back to it, without a label between."""
    loops, start = [], 0
    for number, line in enumerate(lines):
        if label := LABEL.match(line):
            start, name = number, label[1]
        elif (branch := BRANCH.match(line)) and start and branch[1] == name:
            loops.append(lines[start : number + 1])
    return loops


@pytest.mark.parametrize(
    "isa, kernel, cpu, instruction, most",
    [
        ("i8mm", "gemm", "neoverse-v1", "usdot", 16),  # four tokens by four registers of rows
        ("i8mm", "head", "neoverse-v1", "usdot", 48),  # two tokens by two rows by 64 columns by three planes
        ("i8mm", "gemv", "neoverse-v1", "usdot", 8),  # four rows by 32 columns
        ("dotprod", "gemv", "neoverse-n1", "sdot", 8),
        ("dotprod", "gemv", "apple-m1", "sdot", 8),
        ("dotprod", "gemm", "neoverse-n1", "sdot", 16),
        ("dotprod", "gemm", "apple-m1", "sdot", 16),
        ("dotprod", "head", "apple-m1", "fmla", 16),  # two tokens by 32 columns
        ("i8mm", "gemv_groups", "neoverse-v1", "usdot", 8),
        ("dotprod", "gemv_groups", "apple-m1", "sdot", 8),
        ("i8mm", "gemm_groups", "neoverse-v1", "usdot", 16),
        ("dotprod", "gemm_groups", "apple-m1", "sdot", 16),
    ],
)
def test_inner_loops(isa, kernel, cpu, instruction, most):
    uses = re.compile(rf"^\t{instruction}\t")
    loops = inner_loops(assembly(lowered()[isa, kernel], cpu))
    counts = [sum(bool(uses.match(line)) for line in loop) for loop in loops]
    assert max(counts) >= most, f"{instruction} in the inner loops: {counts}"
    for loop, count in zip(loops, counts, strict=True):
        spills = [line for line in loop if "[sp" in line]
        assert not count or not spills, f"{cpu} spills: {spills}"
