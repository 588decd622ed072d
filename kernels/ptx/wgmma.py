"""Warpgroup products (wgmma, sm_90a alone): four neighbouring warps multiply a tile of 64 rows by operands in shared
memory, asynchronously.

Operands in shared memory have rows of 128 bytes with the 128-byte swizzle, as TMA writes them (see `tma`): 128 int8 or
64 bfloat16 of a token or of a weight row. Packed weights are loaded to registers and unpacked there.

Each product comes as three functions: `start` issues it, `all_but_one` waits until only the latest product runs,
`finished` waits for all. Until then its operands must stay and its sums may not be touched.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numba.cuda import types

from bitnet_numba.kernels.ptx.base import (
    SIMULATED,
    WARP,
    as_intrinsic,
    element_address,
    instruction,
    int32,
    simulated_thread,
)
from bitnet_numba.kernels.ptx.tma import SPAN_INTS, simulated_swizzle

TILE_BYTES = 64 * 4 * SPAN_INTS  # of 64 rows in shared memory

# ---- Packed weights to registers -----------------------------------------------------------------------------------

# Byte offsets of a lane's two neighbouring rows in a row-block's 128 columns: 16 columns after the other.
_ROW_PAIR_OFFSETS = [128 * (n // 2) + 32 * (n % 2) for n in range(8)]
_ROW_PAIR_PTX = " ".join(
    f"ld.shared.v2.b32 {{${2 * n}, ${2 * n + 1}}}, [$16+{offset}];" for n, offset in enumerate(_ROW_PAIR_OFFSETS)
)


@instruction(_ROW_PAIR_PTX, "r" * 16, "sr", effects=True)
def load_row_pair(array: Any, address: Any) -> tuple:
    """The packed words of two neighbouring rows in a row-block's 128 columns, int32 x 16: those of both rows for 16
    columns, then for the next 16, ... address: of the first word in a shared array, a multiple of 8. Any
    architecture."""
    first = int(address) // 4
    return tuple(int32(array[first + offset // 4 + r]) for offset in _ROW_PAIR_OFFSETS for r in range(2))


@instruction("{ .reg .b32 t; shr.b32 t, $1, $2; and.b32 $0, t, 0x03030303; }", "r", "rr")
def shifted_codes(word: Any, shift: Any) -> Any:
    """Four codes of a packed word, a byte each: (word >> shift) & 0x03030303. Any architecture."""
    return int32((int(word) & 0xFFFFFFFF) >> int(shift) & 0x03030303)


@instruction(
    "{ .reg .b32 t; shl.b32 t, $1, $2; lop3.b32 $0, t, 0xc0c0c0c0, 0x80808080, 0x6a; }", "r", "rr"
)  # 0x6a: (a & b) ^ c
def shifted_weights(word: Any, shift: Any) -> Any:
    """Four weights of a packed word times 64, a byte each: ((word << shift) & 0xc0c0c0c0) ^ 0x80808080, shift 6 less
    that of `shifted_codes`: a code w + 2 in a byte's upper bits, its highest flipped, is 64 w. sm_50."""
    return int32(((int(word) << int(shift)) & 0xC0C0C0C0) ^ 0x80808080)


# ---- Intrinsics over local arrays ----------------------------------------------------------------------------------


def array_asm(
    emulation: Callable, ptx: str, results: int, read: int = 0, scalars: int = 0, kind: str = "r", keep: bool = True
) -> Callable:
    """An intrinsic of inline PTX with more operands than a function can have parameters: they are the elements of local
    arrays, int32 or (kind "f") float32.

    Its parameters, named as the emulation's, are `sums`, of which the first `results` elements are changed; an int32
    array of which the first `read` elements are operands, if that is not 0; a shared array, which only the emulation
    reads, and `scalars` int32, if that is not 0. In `ptx`: $0 .. are the results, then the elements that are read, then
    the scalars. The old values of `sums` are tied to the results; without `keep` they are lost.
    """
    from llvmlite import ir

    word = ir.FloatType() if kind == "f" else ir.IntType(32)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def elements(n: int, count: int) -> list[Any]:
            array, base = signature.args[n], values[n]
            return [element_address(context, builder, array, base, ir.IntType(64)(i)) for i in range(count)]

        sums = elements(0, results)
        operands = [builder.load(a) for a in elements(1, read)] if read else []
        operands += values[len(values) - scalars :]
        tied = sums if keep else []
        constraints = [f"={kind}"] * results + ["r"] * len(operands) + [str(n) for n in range(len(tied))]
        constraints.append("~{memory}")
        operands += [builder.load(a) for a in tied]
        function = ir.FunctionType(ir.LiteralStructType([word] * results), [value.type for value in operands])
        after = builder.call(ir.InlineAsm(function, ptx, ",".join(constraints), side_effect=True), operands)
        for n, a in enumerate(sums):
            builder.store(builder.extract_value(after, n), a)
        return context.get_dummy_value()

    def definition(typing_context: Any, *arguments: Any) -> Any:
        arrays = arguments[: len(arguments) - scalars]
        return types.void(*arrays, *(types.int32,) * scalars), codegen

    return as_intrinsic(definition, emulation)


@instruction("wgmma.wait_group.sync.aligned 1;", "", "", effects=True)
def _all_but_one() -> None: ...


def _finished(sums: Any) -> None: ...


def descriptor(name: str, address: str) -> str:
    """PTX that makes a shared-memory operand's descriptor: its address / 16, the stride of eight rows / 16, the code of
    the 128-byte swizzle. Adding 2 moves on by 32 bytes in each row."""
    return (
        f"and.b32 low, {address}, 0x3ffff; shr.u32 low, low, 4; or.b32 low, low, 0x10000; "
        f"mov.b32 high, {1024 >> 4 | 1 << 30}; mov.b64 {name}, {{low, high}};"
    )


def swizzled_rows(array: Any, address: int, count: int) -> np.ndarray:
    """Rows at an address in a shared array, int32 [count, SPAN_INTS], their swizzle undone."""
    words = np.asarray(array[address // 4 : address // 4 + SPAN_INTS * count])
    return simulated_swizzle(words.astype(np.int32).reshape(count, SPAN_INTS))


def bf16_rows(array: Any, address: int, count: int) -> np.ndarray:
    """The same rows as float64 of bfloat16 [count, 64]."""
    halves = swizzled_rows(array, address, count).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return halves.view(np.float32).astype(np.float64)


# ---- uint8 codes by int8 -------------------------------------------------------------------------------------------


def _emulated_s8(tokens: int, signed: bool) -> Callable:
    left = np.int8 if signed else np.uint8

    def start(sums: Any, codes: Any, array: Any, address: Any) -> None:
        thread = simulated_thread()
        g, c = divmod(thread.thread_id % WARP, 4)

        def product(lanes: list[tuple]) -> np.ndarray:
            """The warp's, int64 [g, row g or g + 8, token]."""
            words = np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane, _ in lanes]).astype("<u4")
            assert len({start for _, start in lanes}) == 1, "wgmma: the lanes' operands lie at different addresses"
            quads = words.view(left).reshape(8, 4, 4, 2, 2, 4)  # [g, c, step, half, row, byte]
            a = quads.transpose(0, 4, 2, 3, 1, 5).reshape(8, 2, 128).astype(np.int64)  # [g, row, column]
            return a @ swizzled_rows(array, int(address), tokens).view(np.int8).astype(np.int64).T

        own = thread.once_in_warp((tuple(codes[r] for r in range(16)), int(address)), product)[g]
        for t in range(tokens // 8):
            for r in range(2):
                for odd in range(2):
                    n = 4 * t + 2 * r + odd
                    old = 0 if signed else int(sums[n])
                    sums[n] = int32(old + int(own[r, 8 * t + 2 * c + odd]))

    return start


# Descriptors b1 .. b3, by their lower halves: an address in shared memory carries nothing into the upper one.
_NEXT_LOW = "add.u32 low, low, 2; mov.b64 b1, {low, high}; add.u32 low, low, 2; mov.b64 b2, {low, high}; "
_NEXT_LOW += "add.u32 low, low, 2; mov.b64 b3, {low, high};"


def _ptx_s8(tokens: int, signed: bool) -> str:
    count = tokens // 2
    lines = [
        "{ .reg .pred yes, keep; .reg .b32 low, high; .reg .b64 b0, b1, b2, b3;",
        f"setp.eq.u32 yes, 0, 0; setp.eq.u32 keep, 0, {int(signed)};",
        descriptor("b0", f"${count + 16}"),
        _NEXT_LOW,
        "wgmma.fence.sync.aligned;",
    ]
    into = ", ".join(f"${n}" for n in range(count))
    for step in range(4):
        left = ", ".join(f"${count + 4 * step + r}" for r in range(4))
        shape = f"m64n{tokens}k32.s32.{'s8' if signed else 'u8'}.s8"
        old = "yes" if step else "keep"
        lines.append(f"wgmma.mma_async.sync.aligned.{shape} {{{into}}}, {{{left}}}, b{step}, {old};")
    lines.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(lines)


@cache
def wgmma_s8(tokens: int, signed: bool = False) -> tuple[Callable, Callable, Callable]:
    """`start(sums, codes, array, address)`, `all_but_one()`, `finished(sums)`: C [64, tokens] += A [64, 128] .
    B [128, tokens] for a warpgroup, uint8 . int8, int32 sums; 16 rows of A and C for each of its warps. With `signed`
    C = A . B, without what the sums were before, int8 . int8. sm_90a.

    sums, codes: local arrays int32 [tokens / 2] and [16], laid out as `mma_s8` has it: codes[4 s ..] are a0 .. a3 of
    columns 32 s .., sums[4 t ..] are c0 .. c3 of tokens 8 t ... B: `tokens` rows of 128 int8 at an address in a shared
    array.
    """
    start = _emulated_s8(tokens, signed)
    if SIMULATED:
        return start, _all_but_one, _finished
    count = tokens // 2
    wait = array_asm(_finished, "wgmma.wait_group.sync.aligned 0;", count)
    begin = array_asm(start, _ptx_s8(tokens, signed), count, read=16, scalars=1, keep=not signed)
    return begin, _all_but_one, wait


@cache
def wgmma_s8_pair(tokens: int) -> tuple[Callable, Callable, Callable]:
    """`start`, `older_finished(sums)`, `finished(sums)` of signed products as of `wgmma_s8`, of which two run at a
    time, each with sums and codes of its own: `older_finished` waits until only the latest product runs; then `sums`,
    those of the one before, may be touched. sm_90a."""
    start, _, finished = wgmma_s8(tokens, signed=True)
    if SIMULATED:
        return start, _finished, finished
    return start, array_asm(_finished, "wgmma.wait_group.sync.aligned 1;", tokens // 2), finished


# ---- int8 by int8, both in shared memory ---------------------------------------------------------------------------


def _emulated_s8_shared(columns: int, tiles: int) -> Callable:
    def start(sums: Any, array: Any, a: Any, b: Any, keep: Any) -> None:
        thread = simulated_thread()
        g, c = divmod(thread.thread_id % WARP, 4)
        first = thread.thread_id // WARP % 4 * 16 + g
        x = swizzled_rows(array, int(b), columns).view(np.int8).reshape(columns // 8, 8, 128)
        x = x[:, None, 2 * c : 2 * c + 2].astype(np.int64)  # [8 columns, row, column, k]
        for m in range(tiles):
            w = swizzled_rows(array, int(a) + m * TILE_BYTES, 64).view(np.int8)[[first, first + 8], None]
            own = slice(m * columns // 2, (m + 1) * columns // 2)
            products = (w * x).sum(axis=-1).reshape(-1)
            sums[own] = (np.array(sums[own], np.int64) + products if keep else products).astype(np.int32)

    return start


def _ptx_shared(kind: str, columns: int, tiles: int, steps: Sequence[tuple[int, int]], flags: str = "") -> str:
    """The PTX of `tiles` products of 64 rows and `columns` with both operands in shared memory.

    kind: shape in K and types of an instruction. steps: where the operands of each step begin, A's and B's, in 16 bytes
    from their first. flags: the instruction's last operands.
    """
    each = columns // 2
    count = tiles * each
    lines = [
        "{ .reg .pred yes, keep; .reg .b32 low, high; .reg .b64 a, b, x, y;",
        f"setp.eq.u32 yes, 0, 0; setp.ne.u32 keep, ${count + 2}, 0;",
        descriptor("a", f"${count}"),
        descriptor("b", f"${count + 1}"),
        "wgmma.fence.sync.aligned;",
    ]
    for n, (of_a, of_b) in enumerate(steps):
        lines.append(f"add.u64 y, b, {of_b};")
        for m in range(tiles):
            into = ", ".join(f"${m * each + i}" for i in range(each))
            operands = f"{{{into}}}, x, y, {'yes' if n else 'keep'}{flags};"
            lines.append(f"add.u64 x, a, {of_a + m * TILE_BYTES // 16};")
            lines.append(f"wgmma.mma_async.sync.aligned.m64n{columns}{kind} {operands}")
    lines.append("wgmma.commit_group.sync.aligned; }")
    return " ".join(lines)


def _ptx_s8_shared(columns: int, tiles: int) -> str:
    return _ptx_shared("k32.s32.s8.s8", columns, tiles, [(2 * step, 2 * step) for step in range(4)])


@cache
def wgmma_s8_shared(columns: int, tiles: int) -> tuple[Callable, Callable, Callable]:
    """`start(sums, array, a, b, keep)`, `all_but_one()`, `finished(sums)`: C [64 tiles, columns] (+)= A [64 tiles, 128]
    . B [128, columns] for a warpgroup, int8 . int8, int32 sums; with keep 0 the sums start anew. sm_90a.

    sums: a local array int32 [tiles * columns / 2]; sums[m * columns / 2 + 4 t ..] of the warpgroup's warp w are
    c0 .. c3, as `mma_s8` has them, of rows 64 m + 16 w .. and columns 8 t ... a, b: addresses in a shared array of A,
    64 tiles rows of 128 int8, and of B, `columns` (8, 24 or a multiple of 16 up to 256) rows.
    """
    start = _emulated_s8_shared(columns, tiles)
    if SIMULATED:
        return start, _all_but_one, _finished
    count = tiles * columns // 2
    wait = array_asm(_finished, "wgmma.wait_group.sync.aligned 0;", count)
    return array_asm(start, _ptx_s8_shared(columns, tiles), count, scalars=3), _all_but_one, wait


# ---- bfloat16 by float32 in two bfloat16 terms -----------------------------------------------------------------------


def _emulated_bf16_split(tokens: int, tiles: int) -> Callable:
    def start(sums: Any, array: Any, a: Any, b: Any, keep: Any) -> None:
        thread = simulated_thread()
        g, c = divmod(thread.thread_id % WARP, 4)
        first = thread.thread_id // WARP % 4 * 16 + g
        # [term, 8 tokens, row, token, column]
        x = bf16_rows(array, int(b), 2 * tokens).reshape(2, tokens // 8, 1, 8, 64)[:, :, :, 2 * c : 2 * c + 2]
        for m in range(tiles):
            w = bf16_rows(array, int(a) + m * TILE_BYTES, 64)[[first, first + 8], None]
            own = slice(m * tokens // 2, (m + 1) * tokens // 2)
            total = np.array(sums[own], np.float32).reshape(tokens // 8, 2, 2) if keep else np.float32(0)
            for k in range(0, 64, 16):
                for term in range(2):
                    products = w[..., k : k + 16] * x[term, ..., k : k + 16]
                    total = (total + products.sum(axis=-1)).astype(np.float32)
            sums[own] = total.reshape(-1)

    return start


def _ptx_bf16_split(tokens: int, tiles: int) -> str:
    steps = [(2 * step, 2 * step + term * tokens * 8) for step in range(4) for term in range(2)]
    return _ptx_shared("k16.f32.bf16.bf16", tokens, tiles, steps, ", 1, 1, 0, 0")


@cache
def wgmma_bf16_split(tokens: int, tiles: int) -> tuple[Callable, Callable, Callable]:
    """`start(sums, array, a, b, keep)`, `all_but_one()`, `finished(sums)`: C [64 tiles, tokens] (+)= A [64 tiles, 64] .
    (B + B') [64, tokens] for a warpgroup, bfloat16, float32 sums; with keep 0 the sums start anew. Each sum takes 16
    columns at a time, of B and then of B'. sm_90a.

    sums: a local array float32 [tiles * tokens / 2]; sums[m * tokens / 2 + 4 t ..] of the warpgroup's warp w are
    c0 .. c3, as `mma_bf16` has them, of rows 64 m + 16 w .. and tokens 8 t ... a, b: addresses in a shared array of A,
    64 tiles rows of 64 bfloat16, and of B, `tokens` rows, which those of B' follow.
    """
    start = _emulated_bf16_split(tokens, tiles)
    if SIMULATED:
        return start, _all_but_one, _finished
    count = tiles * tokens // 2
    wait = array_asm(_finished, "wgmma.wait_group.sync.aligned 0;", count, kind="f")
    return array_asm(start, _ptx_bf16_split(tokens, tiles), count, scalars=3, kind="f"), _all_but_one, wait
