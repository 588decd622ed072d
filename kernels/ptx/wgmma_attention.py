"""The two warpgroup products of attention (wgmma, sm_90a alone), bfloat16 or float16 with float32 sums: queries times
keys, with both operands in shared memory, and weights times values, with the weights in registers. Queries and weights
are sums of two terms of the same type.

Operands in shared memory are panels: 64 columns of all rows, rows of 128 bytes with the 128-byte swizzle (see `tma`), a
panel after the other. As in `wgmma`, a product comes as `start`, which issues it, and waits for it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np

from bitnet_numba.kernels.ptx.base import SIMULATED, WARP, instruction, simulated_thread
from bitnet_numba.kernels.ptx.tma import SPAN_INTS
from bitnet_numba.kernels.ptx.wgmma import TILE_BYTES, array_asm, descriptor, swizzled_rows

Half = Literal["bf16", "f16"]

_ROW_BYTES = 4 * SPAN_INTS
_PANEL_STEPS = 4  # products of 16 columns in a panel
_WAIT_ALL = "wgmma.wait_group.sync.aligned 0;"


def _numbers(bits: np.ndarray, half: Half) -> np.ndarray:
    """float64 of uint16 bits."""
    if half == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _panels(array: Any, address: int, rows: int, count: int, half: Half) -> np.ndarray:
    """float64 [rows, 64 * count] of an operand."""
    panels = [swizzled_rows(array, address + p * rows * _ROW_BYTES, rows).view(np.uint16) for p in range(count)]
    return _numbers(np.hstack(panels), half)


def _lane() -> tuple[int, int, int]:
    """A lane's first row in its warpgroup's 64, its g and its c."""
    thread = simulated_thread()
    g, c = divmod(thread.thread_id % WARP, 4)
    return thread.thread_id // WARP % 4 * 16 + g, g, c


def _finished(sums: Any) -> None: ...


def _fence(sums: Any, words: Any) -> None: ...


def _emulated_scores(keys: int, steps: int, half: Half) -> Callable:
    panels = -(-steps // _PANEL_STEPS)

    def start(sums: Any, array: Any, queries: Any, k: Any) -> None:
        first, _, c = _lane()
        term_bytes = panels * TILE_BYTES
        terms = [_panels(array, int(queries) + t * term_bytes, 64, panels, half)[[first, first + 8]] for t in range(2)]
        b = _panels(array, int(k), keys, panels, half)
        total = np.zeros((2, keys), np.float32)
        with np.errstate(all="ignore"):  # keys that nobody has stored
            for s in range(steps):
                at = slice(16 * s, 16 * s + 16)
                for term in terms:
                    total = (total + term[:, at] @ b[:, at].T).astype(np.float32)
        own = total.reshape(2, keys // 8, 8)[:, :, 2 * c : 2 * c + 2]  # [row, 8 keys, key]
        sums[: keys // 2] = own.transpose(1, 0, 2).reshape(-1)

    return start


def _ptx_scores(keys: int, steps: int, half: Half) -> str:
    count, panels = keys // 2, -(-steps // _PANEL_STEPS)
    into = ", ".join(f"${n}" for n in range(count))
    lines = [
        "{ .reg .pred no, yes; .reg .b32 low, high; .reg .b64 a, b, x, y;",
        "setp.ne.u32 no, 0, 0; setp.eq.u32 yes, 0, 0;",
        descriptor("a", f"${count}"),
        descriptor("b", f"${count + 1}"),
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(steps):
        panel, within = divmod(step, _PANEL_STEPS)
        lines.append(f"add.u64 y, b, {panel * keys * _ROW_BYTES // 16 + 2 * within};")
        for term in range(2):
            lines.append(f"add.u64 x, a, {(term * panels + panel) * TILE_BYTES // 16 + 2 * within};")
            old = "yes" if step or term else "no"
            shape = f"m64n{keys}k16.f32.{half}.{half}"
            lines.append(f"wgmma.mma_async.sync.aligned.{shape} {{{into}}}, x, y, {old}, 1, 1, 0, 0;")
    lines.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(lines)


@cache
def wgmma_scores(keys: int, steps: int, half: Half) -> tuple[Callable, Callable]:
    """`start(sums, array, queries, k)`, `finished(sums)`: C [64, keys] = (A + A') [64, 16 steps] . B' [keys, 16 steps]
    for a warpgroup, of numbers of the type `half`; the wait is for all products. Each sum takes 16 columns at a time,
    of A and then of A'. sm_90a.

    sums: a local array float32 [keys / 2], whose old values are lost; sums[4 t ..] are c0 .. c3, as `mma_bf16` has
    them, of rows 16 w .. of the warpgroup's warp w and keys 8 t ... queries: address in a shared array of A's panels of
    64 rows, which those of A' follow; k: of B's panels of `keys` rows.
    """
    start = _emulated_scores(keys, steps, half)
    if SIMULATED:
        return start, _finished
    count = keys // 2
    issue = array_asm(start, _ptx_scores(keys, steps, half), count, scalars=2, kind="f", keep=False)
    return issue, array_asm(_finished, _WAIT_ALL, count, kind="f")


def _emulated_values(keys: int, columns: int, half: Half) -> Callable:
    def start(sums: Any, words: Any, array: Any, v: Any) -> None:
        thread = simulated_thread()
        _, g, c = _lane()
        own = tuple(words[n] for n in range(keys // 2))
        lanes = np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane in thread.gather_in_warp(own)], np.uint32)
        # [c, step, term, half, row, column]
        quads = _numbers(lanes.view(np.uint16).reshape(8, 4, keys // 16, 2, 2, 2, 2)[g], half)
        p = quads.transpose(2, 4, 1, 3, 0, 5).reshape(2, 2, keys)
        b = _panels(array, int(v), keys, -(-columns // 64), half)[:, :columns]
        total = np.array(sums[: columns // 2], np.float32).reshape(columns // 8, 2, 2)  # [8 columns, row, column]
        with np.errstate(invalid="ignore"):  # infinities times zeros
            for s in range(keys // 16):
                at = slice(16 * s, 16 * s + 16)
                for term in range(2):
                    more = (p[term, :, at] @ b[at]).reshape(2, columns // 8, 8)[:, :, 2 * c : 2 * c + 2]
                    total = (total + more.transpose(1, 0, 2)).astype(np.float32)
        sums[: columns // 2] = total.reshape(-1)

    return start


def _transposed_descriptor(name: str, address: str, panel_bytes: int) -> str:
    """PTX that makes the descriptor of an operand whose rows are the products' inner dimension: as `descriptor`, and
    the distance of panels / 16. Adding 128 moves on by 16 rows."""
    return (
        f"and.b32 low, {address}, 0x3ffff; shr.u32 low, low, 4; or.b32 low, low, {panel_bytes >> 4 << 16}; "
        f"mov.b32 high, {1024 >> 4 | 1 << 30}; mov.b64 {name}, {{low, high}};"
    )


def _ptx_values(keys: int, columns: int, half: Half) -> str:
    count = columns // 2
    into = ", ".join(f"${n}" for n in range(count))
    lines = [
        "{ .reg .pred yes; .reg .b32 low, high; .reg .b64 b, y;",
        "setp.eq.u32 yes, 0, 0;",
        _transposed_descriptor("b", f"${count + keys // 2}", keys * _ROW_BYTES),
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(keys // 16):
        lines.append(f"add.u64 y, b, {16 * _ROW_BYTES // 16 * step};")
        for term in range(2):
            left = ", ".join(f"${count + 8 * step + 4 * term + n}" for n in range(4))
            shape = f"m64n{columns}k16.f32.{half}.{half}"
            lines.append(f"wgmma.mma_async.sync.aligned.{shape} {{{into}}}, {{{left}}}, y, yes, 1, 1, 1;")
    lines.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(lines)


@cache
def wgmma_values(keys: int, columns: int, half: Half) -> tuple[Callable, Callable, Callable]:
    """`fence(sums, words)`, `start(sums, words, array, v)`, `finished(sums)`: C [64, columns] += (A + A') [64, keys] .
    B [keys, columns] for a warpgroup, of the type `half`; the wait is for all products. Each sum takes 16 keys at a
    time, of A and then of A'. The fence is not needed for that; what computes sums and words does not move beyond it.
    sm_90a.

    sums: a local array float32 [columns / 2], laid out as in `wgmma_scores`. words: a local array int32 [keys / 2],
    of which words[8 s ..] are a0 .. a3, as `mma_bf16` has them, of A for keys 16 s .., and the next four those of A'.
    v: address in a shared array of B's panels of `keys` rows.
    """
    start = _emulated_values(keys, columns, half)
    if SIMULATED:
        return _fence, start, _finished
    count = columns // 2
    fence = array_asm(_fence, "wgmma.fence.sync.aligned;", count, read=keys // 2, kind="f")
    issue = array_asm(start, _ptx_values(keys, columns, half), count, read=keys // 2, scalars=1, kind="f")
    return fence, issue, array_asm(_finished, _WAIT_ALL, count, kind="f")


@instruction("{ .reg .b32 n; add.s32 n, $0, 1; bar.sync n, 128; }", "", "r", effects=True)
def warpgroup_barrier(warpgroup: Any) -> None:
    """A barrier of the threads of the block's warpgroup of that number. sm_70."""
    simulated_thread().syncwarpgroup()
