"""The CPU backend: a checkpoint's weights where they lie in the mapped file, and a team of threads for passes.

What it computes is in `kernels/cpu/step.py`; this is its host side: addresses, buffers, caches, threads.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.cores import usable_cores
from bitnet_numba.backends.cpu.buffers import ALIGN, Buffers, aligned_address
from bitnet_numba.backends.cpu.warmup import Needs, load_kernels
from bitnet_numba.backends.cpu.weights import Weights
from bitnet_numba.backends.host import HostBackend
from bitnet_numba.backends.host_model import PAGE_SIZE, Floats
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.cpu import attention, isa, kv_cache, layout, sampler, step
from bitnet_numba.kernels.cpu.team import Team
from bitnet_numba.sampling_params import SamplingParams

KVDtype = Literal["bfloat16", "float32"]
PATIENCE = 2.0  # seconds that the end of the process waits for a pass
NAN_BITS = 0xFFFFFFFF  # of a float32, and of two bfloat16


def cpu_backend(
    checkpoint: PackedCheckpoint, threads: int | None = None, kv_dtype: KVDtype | None = None
) -> "HostBackend[CpuCache]":
    """The compiled model on the CPU as a backend. kv_dtype: of keys and values; None: bfloat16, and float32 of an
    embedding model."""
    if kv_dtype is None:
        # An embedding model's cache lives for one text only, so that it may be as large as its numbers are exact.
        kv_dtype = "float32" if checkpoint.config.embeds else "bfloat16"
    return HostBackend("cpu", CpuModel(checkpoint, threads, kv_dtype=kv_dtype))


class CpuCache:
    """Keys and values of one sequence in pages of a pool."""

    def __init__(self, pool: "CpuPool", pages: Sequence[int], computed: int):
        self.pool = pool
        self.table = np.array(pages, np.int32)
        self.length = computed

    def extend(self, pages: Sequence[int]) -> None:
        """Adds pages."""
        self.table = np.append(self.table, np.array(pages, np.int32))

    def append_nan(self, count: int) -> None:
        """Appends tokens whose keys and values are NaN in all layers."""
        for position in range(self.length, self.length + count):
            self.pool.store_nan(self.table[position // PAGE_SIZE], position % PAGE_SIZE)
        self.length += count


class CpuPool:
    """Pages of keys and values in all layers. Memory is taken by the operating system as pages are first written."""

    def __init__(self, config: ModelConfig, num_pages: int, dtype: np.dtype[Any]):
        self._config, self._dtype = config, dtype
        self._page_bytes = config.num_layers * kv_cache.layer_bytes(dtype, config.num_kv_heads, config.head_dim)
        self.memory = np.empty(num_pages * self._page_bytes + ALIGN, np.uint8)
        self.address = aligned_address(self.memory)

    def cache(self, pages: Sequence[int], computed: int) -> CpuCache:
        """The cache of a sequence in these pages."""
        return CpuCache(self, pages, computed)

    def store_nan(self, page: int, token: int) -> None:
        """Makes one token's keys and values NaN; see `kernels.cpu.kv_cache` for the layout."""
        c, words = self._config, self._dtype.itemsize // 2  # words of 32 bits to a pair of numbers
        start = self.address - self.memory.ctypes.data + int(page) * self._page_bytes
        layers = self.memory[start : start + self._page_bytes].view(np.uint32).reshape(c.num_layers, -1)
        keys = c.num_kv_heads * kv_cache.key_bytes(self._dtype, c.head_dim) // 4
        unit, lane = divmod(token, kv_cache.PAIRS)
        by_token = layers[:, :keys].reshape(c.num_layers, -1, PAGE_SIZE // kv_cache.PAIRS, words, kv_cache.PAIRS)
        by_token[:, :, unit, :, lane] = NAN_BITS
        layers[:, keys:].reshape(c.num_layers, c.num_kv_heads, PAGE_SIZE, -1)[:, :, token] = NAN_BITS


class _Sampling(NamedTuple):
    """What is sampled from the logits of each of up to MAX_TOKENS tokens."""

    settings: NDArray[np.float64]  # see `sampler.pack_settings`
    seen: Sequence[NDArray[np.int64]]  # the history, if that is looked at
    lengths: Sequence[int]  # of the histories
    edits: Sequence[NDArray[np.float64]]  # see `sampler.pack_edits`
    masks: Sequence[NDArray[np.uint32] | None]  # see `sampling.sample`


class CpuModel:
    """See `host.HostModel`. Calls from several threads run one after the other."""

    uniform = True

    def __init__(
        self,
        checkpoint: PackedCheckpoint,
        threads: int | None = None,
        instruction_set: str | None = None,
        kv_dtype: KVDtype = "bfloat16",
    ):
        """threads: None takes one for each physical core. instruction_set: see `kernels.cpu.isa`; None takes the best.
        kv_dtype: of the cache; float32 is for embeddings, and for comparing with the reference."""
        self.config = c = checkpoint.config
        self.threads = usable_cores() if threads is None else threads
        self.isa = isa.choose(instruction_set)
        self._dtype = np.dtype(np.uint16 if kv_dtype == "bfloat16" else np.float32)
        self._layer_bytes = kv_cache.layer_bytes(self._dtype, c.num_kv_heads, c.head_dim)
        needs = Needs.of(checkpoint, self.isa.name, self._dtype.name)
        kernels = load_kernels(needs)
        self._weights = Weights(checkpoint, kernels.get("row_sums"))
        self._buffers = Buffers(c, self.threads, kernels)
        self._arguments = (self._weights.model, self._weights.layers, self._buffers.job)
        self._lock, self._locked_in, self._owner = threading.Lock(), os.getpid(), 0
        self._team: Team | None = None

    def new_cache(self, capacity: int) -> CpuCache:
        """The cache of one sequence of up to `capacity` tokens."""
        pages = -(-capacity // PAGE_SIZE)
        return self.new_pool(pages).cache(range(pages), 0)

    def new_pool(self, num_pages: int) -> CpuPool:
        """Pages for many sequences."""
        return CpuPool(self.config, num_pages, self._dtype)

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.config.num_layers * self._layer_bytes

    def scratch_bytes(self, pages: int) -> int:
        """About what computing takes beside the cache, in bytes, for contexts of so many pages."""
        return self._buffers.bytes_for(pages * PAGE_SIZE)

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

    def sample(
        self,
        hidden: Floats,
        histories: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        prompt_lengths: Sequence[int],
        logits: Floats | None = None,
        masks: Sequence[NDArray[np.uint32] | None] | None = None,
    ) -> list[int]:
        """`sampling.sample` of the next token of each sequence; NO_TOKEN where logits are NaN. logits,
        masks: see `host.HostModel`."""
        tokens: list[int] = []
        for start in range(0, len(hidden), layout.MAX_TOKENS):
            part = slice(start, start + layout.MAX_TOKENS)
            settings = np.stack([sampler.pack_settings(own) for own in params[part]])
            # Only a repetition penalty looks at the tokens themselves.
            seen = [
                np.array(history if own.repetition_penalty != 1.0 else (), np.int64)
                for history, own in zip(histories[part], params[part], strict=True)
            ]
            edits = [
                sampler.pack_edits(own, history[length:]) if own.edits_logits else sampler.NO_EDITS
                for history, own, length in zip(histories[part], params[part], prompt_lengths[part], strict=True)
            ]
            lengths = [len(history) for history in histories[part]]
            out = None if logits is None else logits[part]
            own_masks = (masks or [None] * len(hidden))[part]
            tokens += self._logits(hidden[part], out, _Sampling(settings, seen, lengths, edits, own_masks))
        return tokens

    def nbytes(self) -> int:
        """Bytes of all weights, which stay in the mapped file."""
        return self._weights.nbytes

    def close(self) -> None:
        """Ends the threads. The next pass starts them again."""
        with self._turn():
            if self._team is not None:
                self._stop_later.detach()
                self._team.stop()
                self._team = None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Keeps other threads out; raises BackendError to who comes amid a pass of the same thread: it would hang."""
        if os.getpid() != self._locked_in:  # a thread of the parent may have held the lock when it was copied
            self._lock, self._locked_in, self._owner = threading.Lock(), os.getpid(), 0
        if self._lock.locked() and self._owner == threading.get_ident():
            raise BackendError("the model was called by a signal handler, amid a call that it interrupted")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0

    def _pass(self, ids: Sequence[int], caches: Sequence[CpuCache], positions: Sequence[int]) -> Floats:
        M, b = len(ids), self._buffers
        pool = caches[0].pool
        # What is wrong here would be read or written beyond the weights or the cache.
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise ValueError(f"token ids must be between 0 and {self.config.vocab_size - 1}")
        if any(position >= PAGE_SIZE * len(cache.table) for position, cache in zip(positions, caches, strict=True)):
            raise ValueError("a sequence has more tokens than its pages hold")
        with self._turn():
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
        sampling: "_Sampling | None" = None,
    ) -> list[int]:
        """Logits of up to MAX_TOKENS hidden states to `out`, if that is given, and the tokens sampled from them."""
        M, b = len(hidden), self._buffers
        with self._turn():
            if out is None:
                out = b.logits_of(M)
            b.final[:M] = hidden
            job = b.job[0]
            job["kind"], job["tokens"], job["settings"] = layout.LOGITS, M, 0
            job["logits"], job["logits_stride"] = out.ctypes.data, out.shape[1]
            if sampling is not None:
                job["settings"] = sampling.settings.ctypes.data
                b.histories[:M] = [ids.ctypes.data for ids in sampling.seen]
                b.history_lengths[:M] = sampling.lengths
                b.edits[:M] = [edits.ctypes.data for edits in sampling.edits]
                b.num_edits[:M] = [len(edits) for edits in sampling.edits]
                b.masks[:M] = [0 if mask is None else mask.ctypes.data for mask in sampling.masks]
            self._run()
            return b.sampled[:M].tolist() if sampling is not None else []

    def _run(self) -> None:
        team = self._team
        if team is None or not team.alive:
            try:
                team = Team(self.threads, step.work, self._arguments)
            except RuntimeError as error:
                raise BackendError(f"{self.threads} threads cannot be started ({error}): fewer may do") from None
            self._stop_later = weakref.finalize(self, _stop, team, self._lock)
            self._team = team
        step.work(0, team.members, team.state, *self._arguments)


def _stop(team: Team, lock: threading.Lock) -> None:
    """Stops a team whose model is gone, or at the end of the process."""
    # At the end, a daemon thread may be in a pass: a member that left amid a region would hang the others.
    if lock.acquire(timeout=PATIENCE):
        try:
            team.stop()
        finally:
            lock.release()
