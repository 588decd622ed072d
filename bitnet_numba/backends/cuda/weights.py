"""A checkpoint's tensors in device memory: one slab, filled from the mapped file through page-locked buffers."""

import numpy as np

from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.parts import MAX_HEAD_DIM
from bitnet_numba.kernels.runtime.driver import Event, Stream
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView, PinnedArray
from bitnet_numba.kernels.sampling.parts import MAX_VOCAB
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS

ALIGN = 256  # bytes: every tensor starts on a memory sector of its own
STAGING = 32 << 20  # bytes of each of two page-locked buffers


def why_unsupported(checkpoint: PackedCheckpoint) -> str | None:
    """What the CUDA backend cannot run about a checkpoint, in a few words; None if it can."""
    config = checkpoint.config
    if config.linear_norm:
        return "linears with a norm of their own (use_rms_norm) run on the reference backend only"
    if any(name.endswith((".qkv.weight", ".o.weight", ".gate_up.weight", ".down.weight")) for name in checkpoint.names):
        return "linears that are not quantised (modules_to_not_convert) run on the reference backend only"
    if config.hidden_size % BLOCK_COLS:
        return f"hidden_size {config.hidden_size} is not a multiple of {BLOCK_COLS}"
    if config.intermediate_size % BLOCK_ROWS:
        return f"intermediate_size {config.intermediate_size} is not a multiple of {BLOCK_ROWS}"
    if config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is over {MAX_HEAD_DIM}"
    if config.vocab_size > MAX_VOCAB:
        return f"a vocabulary of {config.vocab_size} is over {MAX_VOCAB}"
    return None


class Weights:
    """Every tensor of a checkpoint by name, padded with zeros to whole blocks of columns where it is a vector."""

    def __init__(self, checkpoint: PackedCheckpoint, stream: Stream, free: int):
        """Uploads; `free` is the device memory that may be used. Raises BackendError if it does not suffice."""
        self._views: dict[str, DeviceView] = {}
        offsets: dict[str, int] = {}
        size = 0
        for name in checkpoint.names:
            tensor = checkpoint.tensor(name)
            # Norms and scales are read in whole 16-byte pieces, up to the padded number of columns.
            items = -(-tensor.size // BLOCK_COLS) * BLOCK_COLS
            offsets[name] = size
            size += -(-items * tensor.itemsize // ALIGN) * ALIGN
        if size > free:
            raise BackendError(
                f"the weights take {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB of device memory are free"
            )
        self.nbytes = size
        self._slab = DeviceArray(size, np.uint8, zero=True)
        staging = [(PinnedArray(STAGING, np.uint8), Event()) for _ in range(2)]
        turn = 0
        for name in checkpoint.names:
            tensor = checkpoint.tensor(name)
            self._views[name] = DeviceView(self._slab.address + offsets[name], tensor.size, tensor.dtype)
            data = tensor.reshape(-1).view(np.uint8)
            for start in range(0, len(data), STAGING):
                buffer, done = staging[turn % 2]
                part = data[start : start + STAGING]
                if turn >= 2:
                    done.wait()  # the copy out of this buffer, two turns ago
                buffer.host[: len(part)] = part
                stream.upload(self._slab.address + offsets[name] + start, buffer, len(part))
                done.record(stream)
                turn += 1
        stream.synchronize()
        for buffer, _ in staging:
            buffer.close()

    def __getitem__(self, name: str) -> DeviceView:
        return self._views[name]

    def get(self, name: str) -> DeviceView | None:
        """The tensor, or None if the checkpoint has none of that name."""
        return self._views.get(name)

    def close(self) -> None:
        """Frees the slab."""
        self._slab.close()


def head_name(config: ModelConfig) -> str:
    """The rows that make logits: the embedding's, where they are tied."""
    return "embed" if config.tied else "head"
