"""Machine instructions of the tensor cores and what feeds them: asynchronous copies, matrices from shared memory.

Each has a plain-Python stand-in for the simulator; the conventions are those of `intrinsics`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba.cuda import types

from bitnet_numba.kernels.intrinsics import (
    SIMULATED,
    WARP,
    bf16_high,
    bf16_low,
    device_function,
    element_address,
    float_to_bits,
    instruction,
    int32,
)

# ---- Asynchronous copies --------------------------------------------------------------------------------------------

# From global to shared memory. A thread's copies since its last commit are a group, and it waits for groups. Under the
# simulator a copy arrives when it is waited for, or at some barrier before (see tests/simulator.py).


@instruction(
    "{ .reg .u64 to; cvta.to.shared.u64 to, $0; cp.async.cg.shared.global [to], [$1], 16, $2; }",
    "",
    "ppr",
    effects=True,
)
def async_copy4(to: Any, i: Any, source: Any, j: Any, size: Any) -> None:
    """Starts copying 32-bit elements j .. j+3 of global memory to i .. i+3 of a shared array (multiples of 4); `size`
    is 16, or 0 for zeros without reading; the address must lie in the source all the same, see `async_fill4`. sm_80."""
    if not 0 <= int(j) <= len(source) - 4:
        raise IndexError(f"a copy from elements {int(j)} .. {int(j) + 3} of {len(source)}")
    thread: Any = threading.current_thread()
    thread.__dict__.setdefault("async_copies", [[]])[-1].append((to, int(i), source, int(j), int(size)))


@instruction("cp.async.commit_group;", "", "", effects=True)
def async_commit() -> None:
    """Ends a group of this thread's copies. sm_80."""
    threading.current_thread().__dict__.setdefault("async_copies", [[]]).append([])


def _async_wait(pending: int) -> Callable:
    @instruction(f"cp.async.wait_group {pending};", "", "", effects=True)
    def wait() -> None:
        groups = threading.current_thread().__dict__.setdefault("async_copies", [[]])
        while len(groups) - 1 > pending:
            for to, i, source, j, size in groups.pop(0):
                to[i : i + 4] = source[j : j + 4] if size else 0

    return wait


_ASYNC_WAITS = [_async_wait(pending) for pending in range(6)]


def async_wait(pending: int) -> Callable:
    """`wait()`: until at most `pending` (0 to 5) of this thread's latest groups have not arrived. sm_80."""
    return _ASYNC_WAITS[pending]


# ---- Matrices from shared memory ------------------------------------------------------------------------------------

# Matrices of 8 x 8 bfloat16 from shared memory. The place of a row is a 32-bit address, `shared_address`; under
# the simulator it is an offset in bytes, so the array comes along.

if SIMULATED:

    def shared_address(p: Any, i: Any) -> Any:
        """The place of element i of a shared array of 32-bit elements, int32, for the functions below."""
        return int32(4 * int(i))

    def _matrices(p: Any, at: Any) -> np.ndarray:
        rows = threading.current_thread().gather_in_warp(int(at) // 4)  # type: ignore[attr-defined]
        words = np.array([[int(p[row + k]) & 0xFFFFFFFF for k in range(4)] for row in rows], np.uint32)
        return words.view(np.uint16).reshape(4, 8, 8)  # [matrix, row, column]

    def load_matrices(p: Any, at: Any) -> tuple:
        """Four 8 x 8 matrices of bfloat16, int32 x 4: lane 8 i + r gives the place of row r of matrix i (16 bytes, a
        multiple of 16), and receives of each matrix row lane // 4, columns 2 (lane % 4) and the next. sm_75."""
        g, c = divmod(threading.current_thread().thread_id % WARP, 4)  # type: ignore[attr-defined]
        return tuple(int32(int(m[g, 2 * c]) | int(m[g, 2 * c + 1]) << 16) for m in _matrices(p, at))

    def load_matrices_transposed(p: Any, at: Any) -> tuple:
        """The same, but each lane receives column lane // 4, rows 2 (lane % 4) and the next. sm_75."""
        g, c = divmod(threading.current_thread().thread_id % WARP, 4)  # type: ignore[attr-defined]
        return tuple(int32(int(m[2 * c, g]) | int(m[2 * c + 1, g]) << 16) for m in _matrices(p, at))

    def async_fill4(to: Any, at: Any, source: Any, j: Any, size: Any) -> None:
        """`async_copy4` to the place `at` of a shared array; of the 16 bytes the first `size` are copied, 0 or 16, and
        the others zero: with 0 the source is not read. The address must lie in it all the same, since a memory
        checker may look at nothing else. sm_80."""
        if not 0 <= int(j) <= source.size - 4:
            raise IndexError(f"a copy from elements {int(j)} .. {int(j) + 3} of {source.size}")
        async_copy4(to, int(at) // 4, source, j, size)

else:

    @instruction("{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }", "r", "p")
    def _shared_address(p: Any, i: Any) -> Any: ...

    @device_function
    def shared_address(p: Any, i: Any) -> Any:
        return _shared_address(p, i)

    @instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r", effects=True)
    def _load_matrices(at: Any) -> Any: ...

    @instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r", effects=True)
    def _load_matrices_transposed(at: Any) -> Any: ...

    @instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "rpr", effects=True)
    def _async_fill4(at: Any, source: Any, j: Any, size: Any) -> Any: ...

    @device_function
    def load_matrices(p: Any, at: Any) -> Any:
        return _load_matrices(at)

    @device_function
    def load_matrices_transposed(p: Any, at: Any) -> Any:
        return _load_matrices_transposed(at)

    @device_function
    def async_fill4(to: Any, at: Any, source: Any, j: Any, size: Any) -> None:
        _async_fill4(at, source, j, size)


# ---- Matrix products ------------------------------------------------------------------------------------------------


@instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff")
def pack_bf16(low: Any, high: Any) -> Any:
    """Two float32 rounded to bfloat16, ties to even, as a word. sm_80."""

    def rounded(x: Any) -> int:
        bits = int(float_to_bits(x))
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if x == x else 0x7FFF

    return int32(rounded(high) << 16 | rounded(low))


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    "ffff",
    "rrrrrrffff",
)
def mma_bf16(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    """The warp's C [16, 8] += A [16, 16] . B [16, 8], bfloat16 in, float32 sums; returns c0 .. c3. sm_80.

    With g = lane // 4, c = lane % 4, a lane holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 2c, 2c + 1 (a0, a1)
    and 2c + 8, 2c + 9 (a2, a3); of B column g, rows 2c, 2c + 1 (b0) and 2c + 8, 2c + 9 (b1); of C rows g (c0, c1) and
    g + 8 (c2, c3), columns 2c and 2c + 1.
    """
    thread: Any = threading.current_thread()
    lanes = thread.gather_in_warp((a0, a1, a2, a3, b0, b1))
    words = np.array(lanes, np.int64).astype(np.uint32)  # [32, 6]
    halves = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], -1).view(np.float32)  # [32, 6, 2]
    quads = halves.reshape(8, 4, 6, 2)
    a = np.empty((16, 16), np.float64)  # [row, k]
    b = np.empty((16, 8), np.float64)  # [k, column]
    for c in range(4):
        for half in range(2):
            a[:8, 2 * c + half], a[8:, 2 * c + half] = quads[:, c, 0, half], quads[:, c, 1, half]
            a[:8, 2 * c + 8 + half], a[8:, 2 * c + 8 + half] = quads[:, c, 2, half], quads[:, c, 3, half]
            b[2 * c + half], b[2 * c + 8 + half] = quads[:, c, 4, half], quads[:, c, 5, half]
    g, c = divmod(thread.thread_id % WARP, 4)
    rows = a[[g, g, g + 8, g + 8]] * b[:, [2 * c, 2 * c + 1] * 2].T
    return tuple(np.float32(np.float64(start) + row.sum()) for start, row in zip((c0, c1, c2, c3), rows, strict=True))


_MMA_SMALL = "mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32"
_MMA_CODES = {
    80: "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    # Four of eight rows and sixteen columns each: their operands' registers are the larger one's, one by one.
    75: "{ .reg .s32 s<4>; "
    f"{_MMA_SMALL} {{s0, s1}}, {{$4}}, {{$8}}, {{$10, $11}}; {_MMA_SMALL} {{s2, s3}}, {{$5}}, {{$8}}, {{$12, $13}}; "
    f"{_MMA_SMALL} {{s0, s1}}, {{$6}}, {{$9}}, {{s0, s1}}; {_MMA_SMALL} {{s2, s3}}, {{$7}}, {{$9}}, {{s2, s3}}; "
    "mov.b32 $0, s0; mov.b32 $1, s1; mov.b32 $2, s2; mov.b32 $3, s3; }",
}


def _mma_codes(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    thread: Any = threading.current_thread()
    lanes = np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane in thread.gather_in_warp((a0, a1, a2, a3, b0, b1))])
    quads = lanes.astype("<u4").view(np.uint8).reshape(8, 4, 6, 4)  # [g, c, register, byte]
    a = np.empty((16, 32), np.int64)  # [row, k]
    b = np.empty((32, 8), np.int64)  # [k, column]
    for half in range(2):
        a[:8, 16 * half :][:, :16] = quads[:, :, 2 * half].reshape(8, 16)
        a[8:, 16 * half :][:, :16] = quads[:, :, 2 * half + 1].reshape(8, 16)
        b[16 * half :][:16] = quads[:, :, 4 + half].view(np.int8).reshape(8, 16).T
    g, c = divmod(thread.thread_id % WARP, 4)
    sums = (a[[g, g, g + 8, g + 8]] * b[:, [2 * c, 2 * c + 1] * 2].T).sum(axis=1)
    return tuple(int32(int(start) + int(more)) for start, more in zip((c0, c1, c2, c3), sums, strict=True))


_MMA_OF = {least: instruction(ptx, "rrrr", "rrrrrrrrrr")(_mma_codes) for least, ptx in _MMA_CODES.items()}


def mma_codes(arch: int) -> Callable:
    """`mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)`: the warp's C [16, 8] += A [16, 32] . B [32, 8], uint8 . int8,
    int32 sums; returns c0 .. c3. sm_75 (there in four parts).

    With g = lane // 4, c = lane % 4, a lane holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 4c .. 4c + 3 (a0,
    a1) and 4c + 16 .. 4c + 19 (a2, a3); of B column g, rows 4c .. 4c + 3 (b0) and 4c + 16 .. 4c + 19 (b1); of C rows
    g (c0, c1) and g + 8 (c2, c3), columns 2c and 2c + 1.
    """
    return _MMA_OF[max(least for least in _MMA_OF if least <= max(arch, 75))]


_MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@instruction(
    "{ .reg .f32 s<4>; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$4, $5, $6, $7}}, {{$20, $21}}, {{$24, $25, $26, $27}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$8, $9, $10, $11}}, {{$20, $21}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$12, $13, $14, $15}}, {{$22, $23}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{$0, $1, $2, $3}}, {{$16, $17, $18, $19}}, {{$22, $23}}, {{s0, s1, s2, s3}}; }}",
    "ffff",
    "r" * 20 + "ffff",
)
def mma_bf16_terms(
    h0: Any, h1: Any, h2: Any, h3: Any, l0: Any, l1: Any, l2: Any, l3: Any,
    h4: Any, h5: Any, h6: Any, h7: Any, l4: Any, l5: Any, l6: Any, l7: Any,
    b0: Any, b1: Any, b2: Any, b3: Any, c0: Any, c1: Any, c2: Any, c3: Any,
) -> tuple:  # fmt: skip
    """`mma_bf16` over 32 columns with A a sum of two terms: h and l 0 .. 3 with b0, b1, then 4 .. 7 with b2, b3. sm_80.

    One for the compiler, which weighs how much a loop holds before it unrolls it.
    """
    c0, c1, c2, c3 = mma_bf16(h0, h1, h2, h3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(l0, l1, l2, l3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(h4, h5, h6, h7, b2, b3, c0, c1, c2, c3)
    return mma_bf16(l4, l5, l6, l7, b2, b3, c0, c1, c2, c3)


@instruction("fma.rn.bf16x2 $0, $1, $2, $3;", "r", "rrr")
def fma_bf16(a: Any, b: Any, c: Any) -> Any:
    """a * b + c for two bfloat16 in each word, one rounding. sm_80."""
    low = bf16_low(a) * np.float64(bf16_low(b)) + bf16_low(c)
    high = bf16_high(a) * np.float64(bf16_high(b)) + bf16_high(c)
    return pack_bf16(np.float32(low), np.float32(high))


# ---- Warpgroups -----------------------------------------------------------------------------------------------------

# Warpgroups (sm_90a alone): four neighbouring warps multiply what the copy engine has brought to shared memory. A panel
# there is [rows, 128 bytes], int8 or bfloat16, a row for each token (or weight row); of row t the 16-byte piece c lies
# at c ^ (t % 8) ("128-byte swizzle"): eight rows' pieces touch every bank once.
SPAN_INTS = 32  # of a row
PANEL_ALIGN = 1024  # bytes
TILE_BYTES = 64 * 4 * SPAN_INTS  # of a panel's 64 rows


@dataclass
class SimulatedMap:
    """What stands for a tensor map under the simulator: a matrix, int32, and how many rows and columns a copy takes."""

    matrix: np.ndarray
    rows: int
    ints: int


def _swizzled(panel: np.ndarray) -> np.ndarray:
    """A panel, int32 [rows, SPAN_INTS], with its pieces where the swizzle puts them; or back again."""
    pieces = panel.reshape(len(panel), 8, 4)
    order = np.arange(8) ^ np.arange(len(panel))[:, None] & 7
    return np.take_along_axis(pieces, order[:, :, None], axis=1).reshape(panel.shape)


@instruction("{ .reg .b32 t; shr.b32 t, $1, $2; and.b32 $0, t, 0x03030303; }", "r", "rr")
def shifted_codes(word: Any, shift: Any) -> Any:
    """Four codes of a packed word, a byte each: (word >> shift) & 0x03030303."""
    return int32((int(word) & 0xFFFFFFFF) >> int(shift) & 0x03030303)


# The 8-byte pieces of a row-block's 128 columns that hold two neighbouring rows: 16 columns after the other.
_PART_PIECES = [128 * (n // 2) + 32 * (n % 2) for n in range(8)]
_PART_WORDS = " ".join(
    f"ld.shared.v2.b32 {{${2 * n}, ${2 * n + 1}}}, [$16+{piece}];" for n, piece in enumerate(_PART_PIECES)
)

# What follows takes places in shared memory: 32-bit addresses, see `shared_address`.


@instruction("mbarrier.init.shared::cta.b64 [$0], 1; fence.mbarrier_init.release.cluster;", "", "r", effects=True)
def arrival_init(at: Any) -> None:
    """Makes the int64 at a place count the bytes that copies bring. One thread, then a barrier. sm_90."""


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", "rr", effects=True)
def arrival_expect(at: Any, count: Any) -> None:
    """Says how many bytes the copies that report to a place will bring: then its phase is over. One thread. sm_90."""


@instruction(
    "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
    "",
    "rr",
    effects=True,
)
def arrival_wait(at: Any, parity: Any) -> None:
    """Until the phase with this parity (0, 1, 0, ...) is over. All threads of a block together. sm_90."""
    thread: Any = threading.current_thread()
    thread.syncthreads()  # simulated copies arrive at once; but the thread that starts them must have come by


@instruction("barrier.cluster.arrive;", "", "", effects=True)
def cluster_arrive() -> None:
    """The thread has come to the cluster's barrier: what it wrote to shared memory will be seen beyond it. sm_90."""


@instruction("barrier.cluster.wait;", "", "", effects=True)
def cluster_wait() -> None:
    """Until all threads of the cluster have come to its barrier. sm_90."""
    thread: Any = threading.current_thread()
    thread.synccluster()


@instruction("prefetch.tensormap [$0];", "", "p", effects=True)
def prefetch_map(source: Any, i: Any) -> None:
    """Asks for a `tensor_map` (i: 0), so that the first `copy_tile` by it need not wait for it. sm_90."""


if SIMULATED:

    def cluster_load(p: Any, at: Any, rank: Any) -> Any:
        """The int32 at a place of a shared array, in the cluster's block of that rank. sm_90."""
        thread: Any = threading.current_thread()
        return thread.shared_of(p, int(rank))[int(at) // 4]

    def part_words(p: Any, at: Any) -> tuple:
        """The words of a lane's two rows in a row-block's 128 columns, int32 x 16: of both rows, 16 columns after the
        other. at: the place of the first in a shared array."""
        first = int(at) // 4
        return tuple(int32(p[first + piece // 4 + r]) for piece in _PART_PIECES for r in range(2))

    def copy_tile(source: Any, i: Any, to: Any, at: Any, arrival: Any, column: Any, row: Any) -> None:
        """Starts copying a box of a matrix from (row, column) on, in int32, to place `at` of a shared array, row after
        row, zeros beyond the matrix' end; `arrival` counts the bytes. source: a `tensor_map`, i: 0. A panel is
        swizzled. One thread. sm_90."""
        box = np.zeros((source.rows, source.ints), np.int32)
        part = source.matrix[int(row) : int(row) + source.rows, int(column) : int(column) + source.ints]
        box[: part.shape[0], : part.shape[1]] = part
        if source.ints == SPAN_INTS:
            box = _swizzled(box)
        assert int(at) % 128 == 0
        to[int(at) // 4 : int(at) // 4 + box.size] = box.reshape(-1)

else:

    @instruction(
        "{ .reg .b32 t; mapa.shared::cluster.u32 t, $1, $2; ld.shared::cluster.b32 $0, [t]; }", "r", "rr", effects=True
    )
    def _cluster_load(at: Any, rank: Any) -> Any: ...

    @device_function
    def cluster_load(p: Any, at: Any, rank: Any) -> Any:
        return _cluster_load(at, int32(rank))

    @instruction(_PART_WORDS, "r" * 16, "r", effects=True)
    def _part_words(at: Any) -> Any: ...

    @device_function
    def part_words(p: Any, at: Any) -> Any:
        return _part_words(at)

    @instruction(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$0, {$3, $4}], [$2];",
        "",
        "prrrr",
        effects=True,
    )
    def _copy_tile(source: Any, i: Any, at: Any, arrival: Any, column: Any, row: Any) -> None: ...

    @device_function
    def copy_tile(source: Any, i: Any, to: Any, at: Any, arrival: Any, column: Any, row: Any) -> None:
        _copy_tile(source, i, at, arrival, column, row)


def _warpgroup_mma_stand_in(tokens: int) -> tuple[Callable, Callable, Callable]:
    def start(sums: Any, codes: Any, shared: Any, at: Any) -> None:
        thread: Any = threading.current_thread()
        g, c = divmod(thread.thread_id % WARP, 4)
        first = int(at) // 4
        words = np.asarray(shared[first : first + SPAN_INTS * tokens]).astype(np.int32).reshape(tokens, SPAN_INTS)
        b = _swizzled(words).view(np.int8).astype(np.int64)  # [token, column]
        own = tuple(codes[r] for r in range(16))
        lanes = np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane in thread.gather_in_warp(own)])
        quads = lanes.astype("<u4").view(np.uint8).reshape(8, 4, 4, 2, 2, 4)[g].astype(np.int64)
        for r in range(2):  # quads: [c, step, half, row, byte]
            row = quads[:, :, :, r].transpose(1, 2, 0, 3).reshape(-1)
            for t in range(tokens // 8):
                for odd in range(2):
                    n = 4 * t + 2 * r + odd
                    sums[n] = int32(int(sums[n]) + int((row * b[8 * t + 2 * c + odd]).sum()))

    def all_but_one() -> None:
        pass

    def finished(sums: Any) -> None:
        pass

    return start, all_but_one, finished


def _array_asm(ptx: str, results: int, read: int = 0, places: int = 0, kind: str = "r") -> Callable:
    """An intrinsic over local arrays, int32 or (kind "f") float32: the first `results` elements of the first are
    changed; with `read`, so many of a second are read; `places` numbers follow, 1 or 3, after the shared array that
    they are about. Operands of `ptx` in the order results, read, numbers, then the results' old values, which are tied
    to them."""
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    word = ir.FloatType() if kind == "f" else ir.IntType(32)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def elements(n: int, count: int) -> list[Any]:
            array, base = signature.args[n], values[n]
            return [element_address(context, builder, array, base, ir.IntType(64)(i)) for i in range(count)]

        into = elements(0, results)
        operands = [builder.load(a) for a in elements(1, read)] if read else []
        operands += values[len(values) - places :]
        constraints = [f"={kind}"] * results + ["r"] * len(operands) + [str(n) for n in range(results)] + ["~{memory}"]
        operands += [builder.load(a) for a in into]
        function = ir.FunctionType(ir.LiteralStructType([word] * results), [value.type for value in operands])
        after = builder.call(ir.InlineAsm(function, ptx, ",".join(constraints), side_effect=True), operands)
        for n, a in enumerate(into):
            builder.store(builder.extract_value(after, n), a)
        return context.get_dummy_value()

    if read:

        @intrinsic
        def start(typing_context: Any, sums: Any, codes: Any, shared: Any, at: Any) -> Any:
            return types.void(sums, codes, shared, types.int32), codegen

        return start

    if places:

        @intrinsic
        def start_shared(typing_context: Any, sums: Any, shared: Any, a: Any, b: Any, more: Any) -> Any:
            return types.void(sums, shared, types.int32, types.int32, types.int32), codegen

        return start_shared

    @intrinsic
    def wait(typing_context: Any, sums: Any) -> Any:
        return types.void(sums), codegen

    return wait


@instruction("wgmma.wait_group.sync.aligned 1;", "", "", effects=True)
def _all_but_one() -> None: ...


def _descriptor(name: str, place: str) -> str:
    """Makes an operand's descriptor: its place / 16; the distance of 8 rows / 16; the code of the 128-byte swizzle. An
    operand's next 32 bytes of each row are 2 further on."""
    return (
        f"and.b32 low, {place}, 0x3ffff; shr.u32 low, low, 4; or.b32 low, low, 0x10000; "
        f"mov.b32 high, {1024 >> 4 | 1 << 30}; mov.b64 {name}, {{low, high}};"
    )


def _warpgroup_mma_intrinsics(tokens: int) -> tuple[Callable, Callable, Callable]:
    count = tokens // 2
    lines = [
        "{ .reg .pred yes; .reg .b32 low, high; .reg .b64 b0, b1, b2, b3;",
        "setp.eq.u32 yes, 0, 0;",
        _descriptor("b0", f"${count + 16}"),
        "add.u64 b1, b0, 2; add.u64 b2, b0, 4; add.u64 b3, b0, 6;",
        "wgmma.fence.sync.aligned;",
    ]
    into = ", ".join(f"${n}" for n in range(count))
    for step in range(4):
        left = ", ".join(f"${count + 4 * step + r}" for r in range(4))
        shape = f"m64n{tokens}k32.s32.u8.s8"
        lines.append(f"wgmma.mma_async.sync.aligned.{shape} {{{into}}}, {{{left}}}, b{step}, yes;")
    lines.append("wgmma.commit_group.sync.aligned; }")
    start = _array_asm(" ".join(lines), count, 16, 1)
    return start, _all_but_one, _array_asm("wgmma.wait_group.sync.aligned 0;", count)


@cache
def warpgroup_mma(tokens: int) -> tuple[Callable, Callable, Callable]:
    """`start(sums, codes, shared, at)`, `all_but_one()` and `finished(sums)`: C [16 rows, tokens] += A [16, 128] .
    B [128, tokens] for each of the four warps of a warpgroup, uint8 . int8, int32 sums. sm_90a; all four together.

    A product runs on while others start; its codes and B must stay until a wait for all but the latest, or for all. The
    sums are there when all have finished, and may not be touched before.

    sums, codes: local arrays. As of `mma_codes`, codes[4 s ..] are a0, a1, a2, a3 of columns 32 s .., sums[4 t ..] are
    c0 .. c3 of tokens 8 t ... B: a panel at a place in shared memory.
    """
    return (_warpgroup_mma_stand_in if SIMULATED else _warpgroup_mma_intrinsics)(tokens)


def _warpgroup_terms_stand_in(tokens: int, tiles: int) -> tuple[Callable, Callable, Callable]:
    def panel(shared: Any, at: int, rows: int) -> np.ndarray:
        """bfloat16 [rows, 64 columns] as float64."""
        words = np.asarray(shared[at // 4 : at // 4 + SPAN_INTS * rows]).astype(np.int32).reshape(rows, SPAN_INTS)
        halves = _swizzled(words).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return halves.view(np.float32).astype(np.float64)

    def start(sums: Any, shared: Any, a: Any, b: Any, keep: Any) -> None:
        thread: Any = threading.current_thread()
        g, c = divmod(thread.thread_id % WARP, 4)
        first = thread.thread_id // WARP % 4 * 16 + g
        # [term, 8 tokens, row, token, column]
        x = panel(shared, int(b), 2 * tokens).reshape(2, tokens // 8, 1, 8, 64)[:, :, :, 2 * c : 2 * c + 2]
        for m in range(tiles):
            w = panel(shared, int(a) + m * TILE_BYTES, 64)[[first, first + 8], None]
            own = slice(m * tokens // 2, (m + 1) * tokens // 2)
            total = np.array(sums[own], np.float32).reshape(tokens // 8, 2, 2) if keep else np.float32(0)
            for k in range(0, 64, 16):
                for term in range(2):
                    products = w[..., k : k + 16] * x[term, ..., k : k + 16]
                    total = (total + products.sum(axis=-1)).astype(np.float32)
            sums[own] = total.reshape(-1)

    return start, *_warpgroup_mma_stand_in(tokens)[1:]


def _warpgroup_terms_intrinsics(tokens: int, tiles: int) -> tuple[Callable, Callable, Callable]:
    each = tokens // 2
    count = tiles * each
    lines = [
        "{ .reg .pred yes, keep; .reg .b32 low, high; .reg .b64 a, b, x, y;",
        f"setp.eq.u32 yes, 0, 0; setp.ne.u32 keep, ${count + 2}, 0;",
        _descriptor("a", f"${count}"),
        _descriptor("b", f"${count + 1}"),
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        for term in range(2):
            lines.append(f"add.u64 y, b, {2 * step + term * tokens * 8};")
            for m in range(tiles):
                into = ", ".join(f"${m * each + n}" for n in range(each))
                shape, old = f"m64n{tokens}k16.f32.bf16.bf16", "yes" if step or term else "keep"
                lines.append(f"add.u64 x, a, {2 * step + m * TILE_BYTES // 16};")
                lines.append(f"wgmma.mma_async.sync.aligned.{shape} {{{into}}}, x, y, {old}, 1, 1, 0, 0;")
    lines.append("wgmma.commit_group.sync.aligned; }")
    start = _array_asm(" ".join(lines), count, places=3, kind="f")
    return start, _all_but_one, _array_asm("wgmma.wait_group.sync.aligned 0;", count, kind="f")


@cache
def warpgroup_terms(tokens: int, tiles: int) -> tuple[Callable, Callable, Callable]:
    """`start(sums, shared, a, b, keep)`, `all_but_one()` and `finished(sums)`, as of `warpgroup_mma`: C [64 tiles rows,
    tokens] (+)= A [64 tiles rows, 64] . (B + B') [64, tokens] for a warpgroup, bfloat16, float32 sums; with keep 0 the
    sums start anew. Each sum takes 16 columns at a time, of B and then of B'. sm_90a.

    a, b: the places of A and of B, a panel each; the panel of B' follows that of B. sums[m * tokens / 2 + 4 t ..] of
    the warpgroup's warp w: c0 .. c3 as of `mma_bf16` of rows 64 m + 16 w .. and tokens 8 t ...
    """
    return (_warpgroup_terms_stand_in if SIMULATED else _warpgroup_terms_intrinsics)(tokens, tiles)
