"""The threads of the reference's matrix products."""

import threading
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

import bitnet_numba as bn
from bitnet_numba.backends.reference import ReferenceModel
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.reference.model import Model


def of_blas() -> set[int]:
    """The numbers of threads that BLAS has."""
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_threads_of_the_reference(tiny_packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], of_blas()
    for name in ("forward", "logits"):
        function = getattr(Model, name)
        monkeypatch.setattr(Model, name, lambda *a, function=function: (seen.append(of_blas()), function(*a))[1])
    for threads in (1, 2):
        with bn.load(tiny_packed, "reference", threads=threads) as llm:
            llm.generate([5, 6], max_new_tokens=2)
        assert seen and all(pools == {threads} for pools in seen)
        seen.clear()
    assert of_blas() == before


def test_references_in_several_threads_leave_blas_its_threads(tiny_packed: Path) -> None:
    """Who comes second would find, and put back, the limit of the first."""
    entered, left = [threading.Event() for _ in range(2)], threading.Event()
    packed = open_packed(tiny_packed)
    first, second = (ReferenceModel(packed, threads) for threads in (1, 2))

    def compute_first() -> None:
        with first._limit():
            entered[0].set()
            entered[1].wait(0.2)  # in vain: it has to wait
        left.set()

    before = of_blas()
    thread = threading.Thread(target=compute_first)
    thread.start()
    assert entered[0].wait(10)
    with second._limit():
        entered[1].set()
        assert left.wait(10) and of_blas() == {2}
    thread.join()
    assert of_blas() == before
