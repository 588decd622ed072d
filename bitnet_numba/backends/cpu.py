"""The CPU backend: a checkpoint's weights where they lie in the mapped file, and a team of threads for passes.

What it computes is in `kernels/cpu/step.py`; this is its host side: addresses, buffers, caches, threads.
"""

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.host import PAGE_SIZE, Floats, HostBackend
from bitnet_numba.checkpoint.packed import PackedCheckpoint, group_is_ternary
from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.kernels.cpu import attention, isa, kv_cache, layout, lm_head, sampler, step
from bitnet_numba.kernels.cpu.gemm import SCRATCH_ROWS
from bitnet_numba.kernels.cpu.kernels import Kernel, kernels_for
from bitnet_numba.kernels.cpu.team import Team
from bitnet_numba.packing import BLOCK_ROWS, padded_shape
from bitnet_numba.reference.model import rope_tables
from bitnet_numba.sampling import SamplingParams

KVDtype = Literal["bfloat16", "float32"]
ALIGN = 64  # bytes of a cache line


def cpu_backend(checkpoint: PackedCheckpoint, threads: int | None = None) -> "HostBackend[CpuCache]":
    """The compiled model on the CPU as a backend."""
    return HostBackend("cpu", CpuModel(checkpoint, threads))


class CpuCache:
    """Keys and values of one sequence in pages of a pool."""

    def __init__(self, pool: "CpuPool", pages: Sequence[int], computed: int):
        self.pool = pool
        self.table = np.array(pages, np.int32)
        self.length = computed


class CpuPool:
    """Pages of keys and values in all layers. Memory is taken by the operating system as pages are first written."""

    def __init__(self, num_pages: int, page_bytes: int):
        self.values = np.empty(num_pages * page_bytes + ALIGN, np.uint8)
        self.address = _aligned(self.values)

    def cache(self, pages: Sequence[int], computed: int) -> CpuCache:
        """The cache of a sequence in these pages."""
        return CpuCache(self, pages, computed)


class CpuModel:
    """See `host.HostModel`. Calls from several threads run one after the other."""

    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        threads: int | None = None,
        instruction_set: str | None = None,
        kv_dtype: KVDtype = "bfloat16",
    ):
        """threads: None takes one for each physical core. instruction_set: see `kernels.cpu.isa`; None takes the best.
        kv_dtype: of the cache; float32 is for comparing with the reference."""
        self.config = c = checkpoint.config
        self.threads = default_threads() if threads is None else threads
        self.isa = isa.choose(instruction_set)
        self._dtype = np.dtype(np.uint16 if kv_dtype == "bfloat16" else np.float32)
        self._layer_bytes = kv_cache.layer_bytes(self._dtype, c.num_kv_heads, c.head_dim)
        heads = attention.head_tile(c.num_heads // c.num_kv_heads)
        kernels = load_kernels(kernels_for(self.isa, self._dtype, heads, checkpoint.head == "int8"))
        self._weights = _Weights(checkpoint, kernels.get("row_sums"))
        self._buffers = _Buffers(c, self.threads, kernels)
        self._lock = threading.Lock()
        self._team: Team | None = None

    def new_cache(self, capacity: int) -> CpuCache:
        """The cache of one sequence of up to `capacity` tokens."""
        pages = -(-capacity // PAGE_SIZE)
        return self.new_pool(pages).cache(range(pages), 0)

    def new_pool(self, num_pages: int) -> CpuPool:
        """Pages for many sequences."""
        return CpuPool(num_pages, self.page_bytes())

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.config.num_layers * self._layer_bytes

    def forward(self, ids: Sequence[int], cache: CpuCache) -> Floats:
        """Appends tokens to a cache; their final hidden states, float32 [M, hidden]."""
        hidden = []
        for start in range(0, len(ids), layout.MAX_TOKENS):
            part = ids[start : start + layout.MAX_TOKENS]
            hidden.append(self._pass(part, [cache] * len(part), range(cache.length, cache.length + len(part))))
            cache.length += len(part)
        return np.concatenate(hidden)

    def step(self, ids: Sequence[int], caches: Sequence[CpuCache]) -> Floats:
        """Appends one token to each of several caches; their final hidden states, float32 [B, hidden]."""
        hidden = []
        for start in range(0, len(ids), layout.MAX_TOKENS):
            own = caches[start : start + layout.MAX_TOKENS]
            hidden.append(self._pass(ids[start : start + layout.MAX_TOKENS], own, [cache.length for cache in own]))
            for cache in own:
                cache.length += 1
        return np.concatenate(hidden)

    def logits(self, hidden: Floats) -> Floats:
        """Logits of the next token: float32 [M, hidden] -> [M, vocab]."""
        out = np.empty((len(hidden), self.config.vocab_size), np.float32)
        for start in range(0, len(hidden), layout.MAX_TOKENS):
            self._logits(hidden[start : start + layout.MAX_TOKENS], out[start : start + layout.MAX_TOKENS])
        return out

    def sample(self, hidden: Floats, histories: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[int]:
        """`sampling.sample` of the next token of each sequence; NO_TOKEN where logits are NaN."""
        tokens: list[int] = []
        for start in range(0, len(hidden), layout.MAX_TOKENS):
            part = slice(start, start + layout.MAX_TOKENS)
            settings = np.stack([sampler.pack_settings(own) for own in params[part]])
            # Only a repetition penalty looks at the tokens themselves.
            seen = [
                np.array(history if own.repetition_penalty != 1.0 else (), np.int64)
                for history, own in zip(histories[part], params[part], strict=True)
            ]
            lengths = [len(history) for history in histories[part]]
            tokens += self._logits(hidden[part], None, (settings, seen, lengths))
        return tokens

    def nbytes(self) -> int:
        """Bytes of all weights, which stay in the mapped file."""
        return self._weights.nbytes

    def close(self) -> None:
        """Ends the threads. The next pass starts them again."""
        with self._lock:
            if self._team is not None:
                self._team.stop()
                self._team = None

    def _pass(self, ids: Sequence[int], caches: Sequence[CpuCache], positions: Sequence[int]) -> Floats:
        M, b = len(ids), self._buffers
        pool = caches[0].pool
        with self._lock:
            length = max(positions) + 1
            b.hold_positions(length)
            b.ids[:M], b.positions[:M] = ids, positions
            b.tables[:M] = [cache.table.ctypes.data for cache in caches]
            job = b.job[0]
            job["kind"], job["tokens"], job["splits"] = layout.FORWARD, M, -(-length // attention.SPLIT)
            job["cache"], job["page_stride"], job["layer_stride"] = pool.address, self.page_bytes(), self._layer_bytes
            self._run()
            return b.final[:M].copy()

    def _logits(
        self,
        hidden: Floats,
        out: Floats | None,
        sampling: tuple[Floats, Sequence[NDArray[np.int64]], Sequence[int]] | None = None,
    ) -> list[int]:
        """Logits of up to MAX_TOKENS hidden states to `out`, if that is given, and the tokens sampled from them."""
        M, b = len(hidden), self._buffers
        with self._lock:
            if out is None:
                out = b.logits_of(M)
            b.final[:M] = hidden
            job = b.job[0]
            job["kind"], job["tokens"], job["settings"] = layout.LOGITS, M, 0
            job["logits"], job["logits_stride"] = out.ctypes.data, out.shape[1]
            if sampling is not None:
                settings, seen, lengths = sampling
                job["settings"] = settings.ctypes.data
                b.histories[:M], b.history_lengths[:M] = [ids.ctypes.data for ids in seen], lengths
            self._run()
            return b.sampled[:M].tolist() if sampling is not None else []

    def _run(self) -> None:
        team = self._team
        if team is None or not team.alive:
            arguments = (self._weights.model, self._weights.layers, self._buffers.job)
            team = self._team = Team(self.threads, step.work, arguments)
            self._arguments = arguments
            weakref.finalize(self, Team.stop, team)
        step.work(0, team.members, team.state, *self._arguments)


def load_kernels(kernels: dict[str, Kernel]) -> dict[str, int]:
    """The addresses of kernels, compiled if they are not cached, with a progress line."""
    return {name: kernel.address() for name, kernel in kernels.items()}


def call_kernel(address: int, *arguments: int) -> None:
    """Calls a kernel from Python."""
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(address)(*arguments)


class _Weights:
    """Where a checkpoint's tensors are: the arrays that `step` reads."""

    def __init__(self, checkpoint: PackedCheckpoint, row_sums: int | None):
        self.config = c = checkpoint.config
        self._checkpoint = checkpoint
        self._kept: list[NDArray[Any]] = []  # what addresses point to
        self.nbytes = checkpoint.nbytes()
        self.model = np.zeros(1, layout.MODEL)
        m = self.model[0]
        m["hidden"], m["intermediate"], m["vocab"] = c.hidden_size, c.intermediate_size, c.vocab_size
        m["heads"], m["kv_heads"], m["head_dim"] = c.num_heads, c.num_kv_heads, c.head_dim
        m["activation"] = layout.SILU if c.activation == "silu" else layout.RELU2
        m["eps"], m["linear_eps"] = c.rms_norm_eps, c.linear_norm_eps
        m["norm"] = self._address("norm.weight")
        self._rows(m, row_sums)
        self.layers = np.zeros(c.num_layers, layout.LAYER)
        for i, layer in enumerate(self.layers):
            layer["input_norm"] = self._address(f"layers.{i}.input_norm.weight")
            layer["post_attention_norm"] = self._address(f"layers.{i}.post_attention_norm.weight")
            if c.sub_norms:
                layer["attn_sub_norm"] = self._address(f"layers.{i}.attn_sub_norm.weight")
                layer["ffn_sub_norm"] = self._address(f"layers.{i}.ffn_sub_norm.weight")
            for group in GROUPS:
                self._linear(layer[group], i, group)

    def _linear(self, linear: Any, layer: int, group: str) -> None:
        name = f"layers.{layer}.{group}"
        linear["segments"] = len(GROUPS[group])
        if group_is_ternary(self.config, layer, group):
            linear["words"] = self._address(f"{name}.words")
            linear["scales"] = self._address(f"{name}.scales")
            if self.config.linear_norm:
                linear["norms"] = self._address(f"{name}.norms")
        else:
            linear["rows"] = self._keep(_with_min_columns(self._checkpoint.tensor(f"{name}.weight")))
        if self.config.group_bias(group):
            linear["bias"] = self._address(f"{name}.bias")

    def _rows(self, m: Any, row_sums: int | None) -> None:
        names = ("embed", "embed") if self.config.tied else ("embed", "head")
        is_int8 = self._checkpoint.head == "int8"
        m["embed_int8"] = is_int8
        for name, key in zip(names, ("embed", "head"), strict=True):
            rows = self._checkpoint.tensor(f"{name}.weight")
            if key == "head":
                rows = _with_min_columns(rows)
            m[key] = self._keep(rows)
            if is_int8:
                m[f"{key}_scale"] = self._address(f"{name}.scale")
        if row_sums is not None:
            sums = np.empty(self.config.vocab_size, np.int32)
            call_kernel(row_sums, int(m["head"]), rows.shape[1], sums.ctypes.data, 0, len(sums))
            m["head_sums"] = self._keep(sums)

    def _address(self, name: str) -> int:
        return self._keep(self._checkpoint.tensor(name))

    def _keep(self, array: NDArray[Any]) -> int:
        self._kept.append(array)
        return array.ctypes.data


class _Buffers:
    """Memory for a pass, and the job that tells the team where it is."""

    def __init__(self, c: ModelConfig, members: int, kernels: dict[str, int]):
        self._config = c
        M, q_size, longest = layout.MAX_TOKENS, c.q_size, max(c.hidden_size, c.q_size, c.intermediate_size)
        self.ids, self.positions, self.tables = (np.zeros(M, np.int64) for _ in range(3))
        self.histories, self.history_lengths, self.sampled = (np.zeros(M, np.int64) for _ in range(3))
        self._logits = np.empty((0, c.vocab_size), np.float32)
        self.job = np.zeros(1, layout.JOB)
        job = self.job[0]
        self._kept: list[NDArray[Any]] = []
        for name, address in kernels.items():
            if name in layout.KERNELS.fields:
                job["kernels"][name] = address
        for name in ("ids", "positions", "tables", "histories", "history_lengths", "sampled"):
            job[name] = getattr(self, name).ctypes.data
        self.final = self._take("final", (M, c.hidden_size))
        self._take("x", (M, c.hidden_size))
        self._take("qkv", (M, q_size + 2 * c.kv_size))
        self._take("attn_out", (M, q_size))
        self._take("mlp_hidden", (M, c.intermediate_size))
        job["q_stride"] = padded_shape(1, longest)[1]
        job["plane_stride"] = lm_head.prepared_bytes(longest)
        inputs = layout.SEGMENTS * job["q_stride"] + 8 * layout.SEGMENTS * M
        self._take("shared", (M * (inputs + job["plane_stride"]),), np.uint8)
        self._members = members
        # Of a member's own: one token's inputs, then what follows, each from a cache line on.
        self._sizes = {
            "inputs": inputs + job["plane_stride"],
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
        cos, sin = (table[:, : c.head_dim // 2] for table in rope_tables(c, np.arange(length)))
        self._rope = [np.ascontiguousarray(cos), np.ascontiguousarray(sin)]
        job["cos"], job["sin"] = (table.ctypes.data for table in self._rope)
        splits = -(-length // attention.SPLIT)
        row = attention.partial_bytes(c.head_dim)
        self._partials = np.empty(
            (4 * self._members + c.num_kv_heads) * (c.num_heads // c.num_kv_heads) * splits * row, np.uint8
        )
        job["partials"] = self._partials.ctypes.data
        sizes = self._sizes | {"own_partials": c.num_heads // c.num_kv_heads * splits * row}
        offset = 0
        for name, size in sizes.items():
            if name != "inputs":
                job[name] = offset
            offset += -(-size // ALIGN) * ALIGN
        # A page more, so that members do not share the sets of the first-level cache.
        job["own_stride"] = offset + 4096 + ALIGN
        self._own = np.empty(self._members * int(job["own_stride"]) + ALIGN, np.uint8)
        job["own"] = _aligned(self._own)
        self._longest = length

    def _take(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
        """An array from a cache line on, with a line of room behind it; its address goes into the job."""
        count = int(np.prod(shape))
        memory = np.zeros(count * np.dtype(dtype).itemsize + 2 * ALIGN, np.uint8)
        start = -memory.ctypes.data % ALIGN
        array = memory[start : start + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        self._kept.append(array)
        self.job[0][name] = array.ctypes.data
        return array


def _aligned(memory: NDArray[np.uint8]) -> int:
    return -(-memory.ctypes.data // ALIGN) * ALIGN


def _with_min_columns(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of at least as many columns as the kernels need; the same ones, in the mapped file, if they have them."""
    missing = lm_head.MIN_COLUMNS - rows.shape[1]
    return rows if missing <= 0 else np.ascontiguousarray(np.pad(rows, ((0, 0), (0, missing))))


def default_threads() -> int:
    """The physical cores that this process may use: hardware threads of one core share what the kernels need."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = str(cpu)
        with contextlib.suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        cores.add(siblings)
    count = len(cores)
    with contextlib.suppress(OSError, ValueError):  # a container's share of the machine
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count
