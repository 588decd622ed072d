"""Memory for a pass, and the job that tells the team where it is."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.host_model import Floats
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.cpu import attention, layout, lm_head, sampler
from bitnet_numba.kernels.cpu.gemm import SCRATCH_ROWS
from bitnet_numba.packing import BLOCK_ROWS, num_groups, padded_shape
from bitnet_numba.reference.rope import rope_tables

ALIGN = 64  # bytes of a cache line


class Buffers:
    """Memory for a pass, and the job that tells the team where it is."""

    def __init__(self, c: ModelConfig, members: int, kernels: dict[str, int]):
        self._config = c
        M, q_size, longest = layout.MAX_TOKENS, c.q_size, max(c.hidden_size, c.q_size, c.intermediate_size)
        self.ids, self.positions, self.tables = (np.zeros(M, np.int64) for _ in range(3))
        self.histories, self.history_lengths, self.sampled = (np.zeros(M, np.int64) for _ in range(3))
        self.edits, self.num_edits, self.masks = (np.zeros(M, np.int64) for _ in range(3))
        self._logits = np.empty((0, c.vocab_size), np.float32)
        self.job = np.zeros(1, layout.JOB)
        job = self.job[0]
        self._kept: list[NDArray[Any]] = []
        for name, address in kernels.items():
            if name != "row_sums":  # which is called once, when weights are loaded
                job["kernels"][name] = address
        of_tokens = ("ids", "positions", "tables", "histories", "history_lengths", "edits", "num_edits", "masks")
        for name in (*of_tokens, "sampled"):
            job[name] = getattr(self, name).ctypes.data
        self.final = self._take("final", (M, c.hidden_size))
        self._take("x", (M, c.hidden_size))
        self._take("qkv", (M, q_size + 2 * c.kv_size))
        self._take("attn_out", (M, q_size))
        self._take("mlp_hidden", (M, c.intermediate_size))
        job["q_stride"] = padded_shape(1, longest)[1]
        job["plane_stride"] = lm_head.prepared_bytes(longest)
        job["groups"] = num_groups(longest) if c.group_scales else 0
        job["planes"] = c.activation_planes
        job["scale_bytes"] = 4 * M * max(layout.SEGMENTS, int(job["groups"]) * c.activation_planes)
        inputs = layout.SEGMENTS * job["q_stride"] + job["plane_stride"]  # of one token, beside its scales
        self._take("shared", (M * inputs + 2 * job["scale_bytes"],), np.uint8)
        self._members = members
        # Of a member's own: one token's inputs, then what follows, each from a cache line on.
        self._sizes = {
            "inputs": inputs + 2 * job["scale_bytes"],
            "h": 4 * 3 * (longest + 32),
            "acc": 4 * M * (layout.MAX_ROWS + 2 * BLOCK_ROWS) + ALIGN,
            "y": 4 * 2 * M * layout.MAX_ROWS + ALIGN,
            "unpacked": SCRATCH_ROWS * int(job["q_stride"]),
            "scratch": attention.SCRATCH_BYTES,
            "sampler": sampler.scratch_bytes(c.vocab_size),
        }
        self._longest = 0
        self.hold_positions(1024)

    def logits_of(self, tokens: int) -> Floats:
        """Room for the logits of so many tokens, float32 [at least tokens, vocab]."""
        if len(self._logits) < tokens:
            self._logits = np.empty((tokens, self._config.vocab_size), np.float32)
        return self._logits

    def hold_positions(self, length: int) -> None:
        """Makes room for contexts of so many tokens: tables of the rotary embedding, partial outputs of attention."""
        if length <= self._longest:
            return
        c, job = self._config, self.job[0]
        length = min(max(length, 2 * self._longest), max(length, c.max_context))
        partials, sizes = self._sizes_for(length)
        kinds = (False,) if c.local is None else (False, True)
        tables = [table for local in kinds for table in rope_tables(c, np.arange(length), local)]
        rope = [np.ascontiguousarray(table[:, : c.head_dim // 2]) for table in tables]
        shared = np.empty(partials, np.uint8)
        own = np.empty(self._members * _own_stride(sizes) + ALIGN, np.uint8)
        self._rope, self._partials, self._own = rope, shared, own  # all or none, if memory runs out
        for name, table in zip(("cos", "sin", "local_cos", "local_sin"), rope, strict=False):
            job[name] = table.ctypes.data
        job["partials"] = shared.ctypes.data
        offset = 0
        for name, size in sizes.items():
            if name != "inputs":
                job[name] = offset
            offset += _whole_lines(size)
        job["own_stride"] = _own_stride(sizes)
        job["own"] = aligned_address(own)
        self._longest = length

    def bytes_for(self, length: int) -> int:
        """About what contexts of so many tokens take, here and while the tables are made."""
        partials, sizes = self._sizes_for(length)
        tables = 1 if self._config.local is None else 2
        return 40 * tables * length * self._config.head_dim + partials + self._members * _own_stride(sizes) + (1 << 24)

    def _sizes_for(self, length: int) -> tuple[int, dict[str, int]]:
        """Bytes of the shared partial outputs, and of each part of a member's own memory."""
        c = self._config
        group, splits = c.num_heads // c.num_kv_heads, -(-length // attention.SPLIT)
        row = group * splits * attention.partial_bytes(c.head_dim)
        return (4 * self._members + c.num_kv_heads) * row, self._sizes | {"own_partials": row}

    def _take(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
        """An array from a cache line on, with a line of room behind it; its address goes into the job."""
        count = int(np.prod(shape))
        memory = np.zeros(count * np.dtype(dtype).itemsize + 2 * ALIGN, np.uint8)
        start = -memory.ctypes.data % ALIGN
        array: NDArray[Any] = memory[start : start + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        self._kept.append(array)
        self.job[0][name] = array.ctypes.data
        return array


def aligned_address(memory: NDArray[np.uint8]) -> int:
    """The address of the first cache line in an array."""
    return -(-memory.ctypes.data // ALIGN) * ALIGN


def _whole_lines(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _own_stride(sizes: dict[str, int]) -> int:
    """Bytes of a member's own memory: a page more, so that members do not share the sets of the first-level cache."""
    return sum(map(_whole_lines, sizes.values())) + 4096 + ALIGN
