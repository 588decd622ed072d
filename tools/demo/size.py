"""How large the built-in model is, and its special tokens."""

from dataclasses import dataclass

CONTEXT = 2048
VOCAB = 4096
BOS, END, EOT = VOCAB - 10, VOCAB - 9, VOCAB - 1  # the special tokens end the vocabulary


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    ffn: int = 768
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads
