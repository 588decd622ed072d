"""TODO docstring."""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba.cuda import types

from bitnet_numba.kernels.ptx.base import SIMULATED, WARP, element_address, instruction, int32
from bitnet_numba.kernels.ptx.tma import SPAN_INTS, _swizzled

TILE_BYTES = 64 * 4 * SPAN_INTS  # of a panel's 64 rows


@instruction("{ .reg .b32 t; shr.b32 t, $1, $2; and.b32 $0, t, 0x03030303; }", "r", "rr")
def shifted_codes(word: Any, shift: Any) -> Any:
    """Four codes of a packed word, a byte each: (word >> shift) & 0x03030303."""
    return int32((int(word) & 0xFFFFFFFF) >> int(shift) & 0x03030303)


def _wgmma_s8_stand_in(tokens: int) -> tuple[Callable, Callable, Callable]:
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


def _wgmma_s8_intrinsics(tokens: int) -> tuple[Callable, Callable, Callable]:
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
def wgmma_s8(tokens: int) -> tuple[Callable, Callable, Callable]:
    """`start(sums, codes, shared, at)`, `all_but_one()` and `finished(sums)`: C [16 rows, tokens] += A [16, 128] .
    B [128, tokens] for each of the four warps of a warpgroup, uint8 . int8, int32 sums. sm_90a; all four together.

    A product runs on while others start; its codes and B must stay until a wait for all but the latest, or for all. The
    sums are there when all have finished, and may not be touched before.

    sums, codes: local arrays. As of `mma_s8`, codes[4 s ..] are a0, a1, a2, a3 of columns 32 s .., sums[4 t ..] are
    c0 .. c3 of tokens 8 t ... B: a panel at a place in shared memory.
    """
    return (_wgmma_s8_stand_in if SIMULATED else _wgmma_s8_intrinsics)(tokens)


def _wgmma_bf16_split_stand_in(tokens: int, tiles: int) -> tuple[Callable, Callable, Callable]:
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

    return start, *_wgmma_s8_stand_in(tokens)[1:]


def _wgmma_bf16_split_intrinsics(tokens: int, tiles: int) -> tuple[Callable, Callable, Callable]:
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
def wgmma_bf16_split(tokens: int, tiles: int) -> tuple[Callable, Callable, Callable]:
    """`start(sums, shared, a, b, keep)`, `all_but_one()` and `finished(sums)`, as of `wgmma_s8`: C [64 tiles rows,
    tokens] (+)= A [64 tiles rows, 64] . (B + B') [64, tokens] for a warpgroup, bfloat16, float32 sums; with keep 0 the
    sums start anew. Each sum takes 16 columns at a time, of B and then of B'. sm_90a.

    a, b: the places of A and of B, a panel each; the panel of B' follows that of B. sums[m * tokens / 2 + 4 t ..] of
    the warpgroup's warp w: c0 .. c3 as of `mma_bf16` of rows 64 m + 16 w .. and tokens 8 t ...
    """
    return (_wgmma_bf16_split_stand_in if SIMULATED else _wgmma_bf16_split_intrinsics)(tokens, tiles)
