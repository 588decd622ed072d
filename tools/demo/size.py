"""How large the built-in model is."""

from dataclasses import dataclass


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
