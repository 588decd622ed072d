"""The CUDA backend of embedding models (see `backends.protocol.Embedder`): texts in, final hidden states out.

Texts go through the model in passes, as many in one as fit MAX_ROWS rows; see `embedding_pass`. A longer text has a
pass of its own, for which the buffers grow. Passes are captured for powers of two of rows when first needed, and
replayed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.cuda.embedding_pass import EmbeddingBuffers, EmbeddingPass
from bitnet_numba.backends.cuda.state import padded_size
from bitnet_numba.backends.cuda.warmup import load_specs
from bitnet_numba.backends.cuda.weights import RowFormats, Weights, why_unsupported
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.text_attention import BLOCK_TOKENS
from bitnet_numba.kernels.runtime.device import DryRunDevice, usable_device
from bitnet_numba.kernels.runtime.driver import Graph, Stream
from bitnet_numba.kernels.runtime.memory import DeviceView, Uploads

MAX_ROWS = 2048  # of a pass of several texts
RESERVE = 64 << 20  # bytes of device memory left to the driver: graphs, kernels


class TextPass(NamedTuple):
    """What one pass computes."""

    tokens: NDArray[np.int32]  # [rows]
    text_starts: NDArray[np.int32]  # [rows], -1 for rows between texts
    ends: list[tuple[int, int]]  # of each text: its index, and the row of its last token


def plan_texts(texts: Sequence[Sequence[int]], max_rows: int) -> Iterator[TextPass]:
    """The passes over all texts in order, of up to `max_rows` rows, or more for one longer text."""
    tokens: list[int] = []
    starts: list[int] = []
    ends: list[tuple[int, int]] = []
    for i, ids in enumerate(texts):
        first = -(-len(tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
        if tokens and first + len(ids) > max_rows:
            yield TextPass(np.array(tokens, np.int32), np.array(starts, np.int32), ends)
            tokens, starts, ends, first = [], [], [], 0
        spare = first - len(tokens)
        tokens += [0] * spare + [*ids]
        starts += [-1] * spare + [first] * len(ids)
        ends.append((i, len(tokens) - 1))
    if tokens:
        yield TextPass(np.array(tokens, np.int32), np.array(starts, np.int32), ends)


class CudaEmbedder:
    """An embedding model on one NVIDIA GPU."""

    name = "cuda"

    def __init__(self, checkpoint: PackedCheckpoint):
        """Compiles what is not cached, with a progress line, and uploads the weights. Raises BackendError."""
        reason = why_unsupported(checkpoint)
        if reason is not None:
            raise BackendError(f"CUDA cannot run this model: {reason}")
        self.config = checkpoint.config
        self._device = usable_device()
        self._device.activate()
        load_specs(self.config, RowFormats(checkpoint.embed, checkpoint.head), self._device)
        self._stream = Stream()
        self._uploads = Uploads(self._stream)
        # None: what could not be allocated, and the next pass tries again.
        self._buffers: EmbeddingBuffers | None = EmbeddingBuffers(self._device, self.config, MAX_ROWS)
        free, _ = self._device.memory_info()
        self._weights = Weights.upload(checkpoint, self._stream, free - RESERVE)
        self._graphs: dict[int, Graph] = {}

    def last_hidden(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The final hidden states of the last tokens of texts, see `protocol.Embedder`."""
        self._device.activate()
        hidden = self.config.hidden_size
        result = np.empty((len(texts), hidden), np.float32)
        for tokens, text_starts, ends in plan_texts(texts, MAX_ROWS):
            buffers = self._run(tokens, text_starts)
            for i, row in ends:
                address = buffers.n.address + 4 * row * hidden
                DeviceView(address, hidden, np.float32).read_into(result[i])
        return result

    def _run(self, tokens: NDArray[np.int32], text_starts: NDArray[np.int32]) -> EmbeddingBuffers:
        """Computes a pass, and returns the buffers that its final hidden states are in."""
        num_rows = len(tokens)
        padded = padded_size(num_rows, BLOCK_TOKENS)
        b = self._buffers
        if b is None or padded > b.max_rows:
            b = self._grow(max(padded, MAX_ROWS))
        spare = np.full(padded - num_rows, -1, np.int32)
        starts = np.concatenate([text_starts, spare])
        slots = np.where(starts >= 0, 0, -1)
        self._uploads.write(b.tokens, tokens)
        self._uploads.write(b.text_starts, starts)
        self._uploads.write(b.slot_positions, np.stack([slots, np.arange(padded)], axis=1))
        self._uploads.write(b.num_real, [num_rows])
        if padded not in self._graphs:
            launches = EmbeddingPass(self.config, self._device, self._weights, b, padded).launches()
            self._graphs[padded] = self._stream.capture(launches)
        self._graphs[padded].replay(self._stream)
        self._stream.synchronize()
        return b

    def _grow(self, rows: int) -> EmbeddingBuffers:
        """Makes room for passes of so many rows. Raises BackendError if memory is insufficient."""
        needed = EmbeddingBuffers(DryRunDevice(self._device.arch, self._device.num_sms), self.config, rows).nbytes
        self.free_idle()
        free, _ = self._device.memory_info()
        if needed > free + self._buffer_bytes - RESERVE:
            raise BackendError(
                f"a text of up to {rows} tokens takes {needed / 1e9:.2f} GB of device memory, and "
                f"{free / 1e9:.2f} GB are free"
            )
        if self._buffers is not None:
            self._buffers.close()
            self._buffers = None
        self._buffers = EmbeddingBuffers(self._device, self.config, rows)
        return self._buffers

    @property
    def _buffer_bytes(self) -> int:
        return 0 if self._buffers is None else self._buffers.nbytes

    def free_idle(self) -> None:
        """Frees the captured passes."""
        self._device.activate()
        for graph in self._graphs.values():
            graph.close()
        self._graphs = {}

    def memory(self) -> dict[str, int]:
        """Bytes of device memory in use by purpose."""
        return {"weights": self._weights.nbytes, "activations": self._buffer_bytes}

    def new_context(self, capacity: int) -> NoReturn:
        """Refused: raises BackendError."""
        raise BackendError("an embedding model generates nothing")

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> NoReturn:
        """Refused: raises BackendError."""
        raise BackendError("an embedding model generates nothing")
