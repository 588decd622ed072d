"""The CUDA backend behind the engine's interface (see `backends.protocol`): a model on one NVIDIA GPU."""

from bitnet_numba.backends.cuda.batch import CudaBatch
from bitnet_numba.backends.cuda.batch_memory import BatchMemory, fixed_bytes
from bitnet_numba.backends.cuda.buffers import Buffers
from bitnet_numba.backends.cuda.context import CudaContext
from bitnet_numba.backends.cuda.forward import MAX_TOKENS, CudaModel
from bitnet_numba.backends.cuda.runtime import Runtime
from bitnet_numba.backends.cuda.state import page_bytes, pages_of
from bitnet_numba.backends.cuda.warmup import load_specs
from bitnet_numba.backends.cuda.weights import RowFormats, Weights, why_unsupported
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.runtime.device import usable_device
from bitnet_numba.kernels.runtime.driver import Stream

MAX_SEQUENCES = 512  # of a batch
LOADED_AHEAD = 256  # sequences of a batch whose kernels are loaded at the start, where that is done
RESERVE = 64 << 20  # bytes of device memory left to the driver: graphs, kernels
BATCH_RESERVE = 2 * RESERVE  # a batch may come to have a hundred graphs, and to score prompts
KEPT_SHARE = 4  # memory of a batch that has ended is kept for the next if it is at most this part of the device's


def why_unusable() -> str | None:
    """Why CUDA cannot be used here, in a few words; None if it can."""
    try:
        usable_device()
    except BackendError as error:
        return str(error)
    return None


class CudaBackend:
    """A model on one NVIDIA GPU."""

    name = "cuda"

    def __init__(self, checkpoint: PackedCheckpoint, kv_dtype: KVDtype = DEFAULT):
        """Compiles what is not cached, with a progress line, and uploads the weights. kv_dtype: of keys and values in
        all contexts and batches. Raises BackendError."""
        reason = why_unsupported(checkpoint)
        if reason is not None:
            raise BackendError(f"CUDA cannot run this model: {reason}")
        self.device = usable_device()
        self.device.activate()
        self.config, self._rows = checkpoint.config, RowFormats(checkpoint.embed, checkpoint.head)
        self._page_bytes = page_bytes(self.config, kv_dtype)
        # Sequences of the largest batch whose kernels are loaded
        self._loaded_for = load_specs(self.config, self._rows, self.device, ahead=LOADED_AHEAD, kv_dtype=kv_dtype)
        self.stream = Stream()
        # Buffers first, so that what is left for the weights is known, and told in one line if it does not suffice.
        token_buffers, buffers = (Buffers(self.device, self.config, max_tokens) for max_tokens in (1, MAX_TOKENS))
        free, _ = self.device.memory_info()
        self.weights = Weights.upload(checkpoint, self.stream, free - RESERVE)
        self.model = CudaModel(self.config, self.device, self.weights, token_buffers, buffers, kv_dtype)
        self._runtime = Runtime(self.device, self.model, self.stream)
        self._kv_cache = 0
        self._kept: BatchMemory | None = None

    def new_context(self, capacity: int) -> CudaContext:
        """An empty context for up to `capacity` tokens. Raises BackendError when memory does not suffice."""
        self.device.activate()
        needed = pages_of(capacity) * self._page_bytes
        free, _ = self.device.memory_info()
        if needed > free - RESERVE and self._kept is not None:
            self.free_idle()
            free, _ = self.device.memory_info()
        if needed > free - RESERVE:
            fits = max(0, (free - RESERVE) // self._page_bytes * PAGE)
            raise BackendError(
                f"a context of {capacity} tokens takes {needed / 1e9:.2f} GB of device memory and {free / 1e9:.2f} GB "
                f"are free: --context {fits} would fit"
            )
        context = CudaContext(self._runtime, capacity, self._release)
        self._kv_cache += needed
        return context

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> CudaBatch:
        """Room for sequences that decode together. Raises BackendError when memory does not suffice."""
        if max_sequences > MAX_SEQUENCES:
            raise BackendError(f"at most {MAX_SEQUENCES} sequences decode together on CUDA, not {max_sequences}")
        self.device.activate()
        least = pages_of(capacity)
        wanted = max_sequences * least if tokens is None else pages_of(tokens)
        memory = self._take_kept(max_sequences, capacity, wanted) or self._new_batch_memory(
            max_sequences, capacity, wanted, wanted if tokens is not None else least
        )
        self._kv_cache += memory.cache_bytes
        return CudaBatch(memory, max_sequences, min(wanted, memory.pages), self._keep)

    def _take_kept(self, max_sequences: int, capacity: int, pages: int) -> BatchMemory | None:
        """The memory that is kept, if it serves a batch of this size; if not, it is freed."""
        kept = self._kept
        if kept is not None and not kept.fits(max_sequences, capacity, pages):
            self.free_idle()
            return None
        self._kept = None
        return kept

    def _new_batch_memory(self, max_sequences: int, capacity: int, wanted: int, least: int) -> BatchMemory:
        """New memory with as many pages as are wanted and fit, but at least `least`."""
        free, _ = self.device.memory_info()
        free = max(0, free - BATCH_RESERVE - fixed_bytes(self.config, max_sequences, capacity, self.model.kv_dtype))
        fit = free // self._page_bytes
        if fit < least:
            needed = least * self._page_bytes / 1e9
            raise BackendError(
                f"a batch of {least * PAGE} tokens takes {needed:.2f} GB of device memory and "
                f"{free / 1e9:.2f} GB are free: {fit * PAGE} tokens would fit"
            )
        if max_sequences > self._loaded_for:
            self._loaded_for = load_specs(
                self.config, self._rows, self.device, max_sequences, kv_dtype=self.model.kv_dtype
            )
        return BatchMemory(self._runtime, max_sequences, capacity, min(wanted, fit))

    def free_idle(self) -> None:
        """Frees the memory that is kept for a next batch."""
        if self._kept is not None:
            self.device.activate()
            self._kept.close()
            self._kept = None

    def memory(self) -> dict[str, int]:
        """Bytes of device memory in use by purpose."""
        model = self.model
        activations = model.token_buffers.nbytes() + model.buffers.nbytes() + self._runtime.decode_buffers.nbytes()
        kept = 0 if self._kept is None else self._kept.cache_bytes
        return {"weights": self.weights.nbytes, "kv_cache": self._kv_cache + kept, "activations": activations}

    def _release(self, pages: int) -> None:
        """Called with the number of pages of keys and values that a context has freed."""
        self._kv_cache -= pages * self._page_bytes

    def _keep(self, memory: BatchMemory) -> None:
        """Takes the memory of a batch that is closed, for the next one, unless it is much."""
        self._kv_cache -= memory.cache_bytes
        self.free_idle()
        _, total = self.device.memory_info()
        if memory.cache_bytes <= total // KEPT_SHARE:
            self._kept = memory
        else:
            memory.close()
