"""The NumPy reference as a host model: one sequence after another, as slow and as plain as the specification.

Prompts are computed in pieces that end at multiples of PAGE_SIZE, so every matrix product of a sequence has the same
shape in a batch as in a context of its own, and its tokens are the same, bit for bit.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from bitnet_numba.backends.cores import within_quota
from bitnet_numba.backends.host import HostBackend
from bitnet_numba.backends.host_model import PAGE_SIZE
from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.reference.model import Cache, Floats, Model
from bitnet_numba.sampling import sample
from bitnet_numba.sampling_params import SamplingParams

# Memory that computing takes beside the cache and attention scores. Half of it is OpenBLAS's, which ends the process if
# it cannot have it.
WORKSPACE_BYTES = 1 << 26


class _Turn:
    """Models that limit the threads of BLAS take turns: its number is the process's, and who ends puts back the one
    that he found."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):  # a thread of the parent may hold the lock
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Forgets who has the turn."""
        self.lock = threading.RLock()  # reentrant, for signal handlers and the garbage collector


_turn = _Turn()


def reference_backend(checkpoint: PackedCheckpoint, threads: int | None = None) -> "ReferenceBackend":
    """The NumPy reference as a backend, with so many threads of BLAS, or as many as it takes within the CPU time that
    a container has.

    Raises BackendError if memory is insufficient.
    """
    try:
        return HostBackend("reference", ReferenceModel(checkpoint, threads))
    except MemoryError:
        # Ternary weights are int8 there, four times the size of the file's two bits.
        sizes = [spec.nbytes * (4 if name.endswith(".words") else 1) for name, spec in checkpoint.file.specs.items()]
        raise BackendError(f"the model takes {sum(sizes) / 1e9:.2f} GB of memory, which are not free") from None


class ContiguousCache(Cache):
    """Keys and values of one sequence, in memory of its own."""

    def extend(self, pages: Sequence[int]) -> None:
        """Refused: it has no pages."""
        raise ValueError("a contiguous cache has no pages")

    def append_nan(self, count: int) -> None:
        """Appends tokens whose keys and values are NaN in all layers."""
        self.values[:, :, self.length : self.length + count] = np.nan
        self.length += count


class PagedCache(Cache):
    """Keys and values of one sequence, in pages of a shared pool."""

    def __init__(self, pool: Floats, pages: Sequence[int], computed: int):
        """pool: float32 [num_pages, layers, 2, PAGE_SIZE, G, D]. computed: leading tokens already in the pages."""
        self._pool = pool
        self._pages: NDArray[np.int64] = np.asarray(pages, np.int64)
        self.length = computed

    def extend(self, pages: Sequence[int]) -> None:
        """Adds pages."""
        self._pages = np.append(self._pages, np.asarray(pages, np.int64))

    def append(self, layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Stores the next tokens' keys and values [M, G, D] of a layer; returns those of all tokens [T, G, D]."""
        end = self.length + len(keys)
        positions = np.arange(self.length, end)
        pages, offsets = self._pages[positions // PAGE_SIZE], positions % PAGE_SIZE
        self._pool[pages, layer, 0, offsets], self._pool[pages, layer, 1, offsets] = keys, values
        used = self._pool[self._pages[: -(-end // PAGE_SIZE)], layer]  # [pages, 2, PAGE_SIZE, G, D]
        shape = (-1, *keys.shape[1:])
        return used[:, 0].reshape(shape)[:end], used[:, 1].reshape(shape)[:end]

    def append_nan(self, count: int) -> None:
        """Appends tokens whose keys and values are NaN in all layers."""
        positions = np.arange(self.length, self.length + count)
        self._pool[self._pages[positions // PAGE_SIZE], :, :, positions % PAGE_SIZE] = np.nan
        self.length += count


class ReferencePool:
    """Pages of keys and values in all layers."""

    def __init__(self, config: ModelConfig, num_pages: int):
        shape = (num_pages, config.num_layers, 2, PAGE_SIZE, config.num_kv_heads, config.head_dim)
        self.values = np.empty(shape, np.float32)

    def cache(self, pages: Sequence[int], computed: int) -> PagedCache:
        """The cache of a sequence in these pages."""
        return PagedCache(self.values, pages, computed)


def _most_threads(blas: ThreadpoolController) -> int | None:
    """The threads for which this process has CPUs; None if BLAS takes no more than those."""
    taken = max((pool["num_threads"] for pool in blas.select(user_api="blas").info()), default=1)
    allowed = within_quota(taken)
    return None if allowed == taken else allowed


class ReferenceModel:
    """See `host.HostModel`."""

    uniform = False  # BLAS rounds the sums of a product of one row differently

    def __init__(self, checkpoint: PackedCheckpoint, threads: int | None = None):
        self.model = Model(checkpoint)
        self.config = self.model.config
        self._blas = ThreadpoolController()
        self._threads = _most_threads(self._blas) if threads is None else threads

    def new_cache(self, capacity: int) -> ContiguousCache:
        """The cache of one sequence of up to `capacity` tokens."""
        return ContiguousCache(self.config, capacity)

    def new_pool(self, num_pages: int) -> ReferencePool:
        """Pages for many sequences."""
        return ReferencePool(self.config, num_pages)

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        c = self.config
        return 4 * 2 * PAGE_SIZE * c.num_layers * c.num_kv_heads * c.head_dim

    def scratch_bytes(self, pages: int) -> int:
        """About what computing takes beside the cache, in bytes, for contexts of so many pages."""
        scores = 4 * 4 * self.config.num_heads * PAGE_SIZE**2  # float32, four copies at a time, for each page
        return pages * scores + WORKSPACE_BYTES

    def forward(self, ids: Sequence[int], cache: ContiguousCache | PagedCache) -> Floats:
        """Appends tokens to a cache and returns their final hidden states, float32 [M, hidden]."""
        with self._limit():
            return np.concatenate(list(self._pieces(ids, cache)))

    def step(self, ids: Sequence[int], caches: Sequence[ContiguousCache | PagedCache]) -> Floats:
        """Appends one token to each cache; their final hidden states, float32 [B, hidden]."""
        return np.concatenate([self.forward([token], cache) for token, cache in zip(ids, caches, strict=True)])

    def logits(self, hidden: Floats) -> Floats:
        """Logits of the next token: [M, hidden] -> [M, vocab]."""
        with self._limit():
            return self.model.logits(hidden)

    def sample(
        self,
        hidden: Floats,
        histories: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        prompt_lengths: Sequence[int],
        logits: Floats | None = None,
        masks: Sequence[NDArray[np.uint32] | None] | None = None,
    ) -> list[int]:
        """The next token of each sequence; NO_TOKEN where logits are NaN. logits, masks: see `host.HostModel`."""
        tokens = []
        with np.errstate(all="ignore"):  # NO_TOKEN replaces NumPy's warnings
            rows = zip(histories, params, prompt_lengths, masks or [None] * len(hidden), strict=True)
            for i, (history, own, length, mask) in enumerate(rows):
                row = self.logits(hidden[i : i + 1])[0]
                if logits is not None:
                    logits[i] = row
                tokens.append(NO_TOKEN if np.isnan(row).any() else sample(row, history, own, length, mask))
        return tokens

    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.model.nbytes()

    def close(self) -> None:
        """Nothing to end."""

    @contextlib.contextmanager
    def _limit(self) -> Iterator[None]:
        """While it lasts, BLAS has the model's number of threads: in the whole process, since it knows no other way."""
        if self._threads is None:
            yield
            return
        with _turn.lock, self._blas.limit(limits=self._threads, user_api="blas"):
            yield

    def _pieces(self, ids: Sequence[int], cache: ContiguousCache | PagedCache) -> Iterator[Floats]:
        start = 0
        while start < len(ids):
            piece = np.asarray(ids[start : start + PAGE_SIZE - cache.length % PAGE_SIZE], np.int64)
            length = cache.length
            try:
                with np.errstate(all="ignore"):  # NaN replaces NumPy's warnings
                    yield self.model.forward(piece, cache)
            except ValueError as error:
                if "NaN" not in str(error):
                    raise
                # So that sequences that share the page fail, too.
                cache.length = length
                cache.append_nan(len(piece))
                yield np.full((len(piece), self.config.hidden_size), np.nan, np.float32)
            start += len(piece)


ReferenceBackend = HostBackend[ContiguousCache | PagedCache]
