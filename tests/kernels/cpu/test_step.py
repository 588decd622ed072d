"""A pass as a member sees it that is late for all of its regions."""

from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest

from bitnet_numba.kernels.cpu import products, step

WORK = ("prepare", "gather", "attend", "rotate_and_store", "qkv_rows", "residual_rows", "gated_rows", "head_rows")


class Numbers:
    """A table of a model or of a layer; any number will do."""

    def __getattr__(self, name: str) -> int:
        return 64


class Job(Numbers):
    """A job that the host replaces by the next one again and again."""

    def __init__(self, sizes: tuple[int, ...]):
        self._sizes = cycle(sizes)

    @property
    def tokens(self) -> int:
        return next(self._sizes)


@pytest.mark.parametrize("kind", ["forward", "logits"])
@pytest.mark.parametrize("sizes", [(64, 6), (64, 1), (1, 64), (64, 6, 1)])
def test_a_member_that_is_late_for_all_regions_does_nothing(
    kind: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host writes the next pass's numbers while it still walks by the regions of the one before."""

    def work(*arguments: Any) -> None:
        raise AssertionError("a member works outside of a region")

    for module in (step, products):
        for name, function in list(vars(module).items()):
            if name in WORK or name in ("take", "sample", "product"):
                monkeypatch.setattr(module, name, work)
            elif hasattr(function, "py_func"):
                monkeypatch.setattr(module, name, function.py_func)
        monkeypatch.setattr(module, "call", work)
        monkeypatch.setattr(module, "enter", lambda state, region, pieces: False)
        monkeypatch.setattr(module, "leave", lambda state, region, inside: region + 1)
    monkeypatch.setattr(step, "embedding", SimpleNamespace(row=work))
    monkeypatch.setattr(step, "norm", SimpleNamespace(rms_norm=work))
    monkeypatch.setattr(step, "lm_head", SimpleNamespace(prepare_float=work))
    if kind == "forward":
        step.forward(1, 2, 0, 1, Numbers(), [Numbers()] * 2, Job(sizes))
    else:
        step.logits(1, 2, 0, 1, Numbers(), Job(sizes))
