"""Several processes compile the kernels that a model needs. No device is needed."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_numba.backends.cuda import warmup
from bitnet_numba.backends.cuda.batch_memory import fixed_bytes
from bitnet_numba.backends.cuda.extras import Extras
from bitnet_numba.backends.cuda.forward import CudaModel
from bitnet_numba.backends.cuda.state import SequenceState, padded_size, page_bytes, step_size, step_sizes
from bitnet_numba.backends.cuda.steps import BatchSteps
from bitnet_numba.backends.cuda.weights import RowFormats
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.config import ModelConfig
from bitnet_numba.engine.loading import DEMO
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.paged_decode import max_splits_of, work_entries
from bitnet_numba.kernels.runtime import compiler
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import ArchSpec
from tools.make_checkpoint import PRESETS

INT8_ROWS = RowFormats("int8", "int8")


def test_processes_compile_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "2")
    monkeypatch.setattr(warmup, "MIN_SHARE", 3)
    config = open_packed(DEMO).config
    needs = warmup.Needs(config, INT8_ROWS, ArchSpec(90, 132))
    quick = ("advance", "append", "embed", "gather_last", "quantize")  # to compile
    specs = [spec for spec in needs.specs() if spec.name.startswith(quick)]
    assert len(specs) >= 7
    compiler.machine_code(specs[3], 90)
    counts: list[int] = []
    (tmp_path / "bitnet_numba").mkdir()  # a stranger of the same name, where the user happens to be
    (tmp_path / "bitnet_numba" / "__init__.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    warmup.compile_together(needs, specs, counts.append)
    assert all(compiler.is_cached(spec, 90) for spec in specs)
    assert len(list((tmp_path / "cache").iterdir())) == len(specs), "only what was asked for"
    assert counts == sorted(counts) and counts[-1] == len(specs) - 1
    warmup.compile_together(needs, specs, counts.append)
    assert counts[-1] == len(specs) - 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The processes that would have been started; each ends at once and has compiled nothing."""
    processes: list[Any] = []

    class Process:
        def __init__(self, command: Any, **pipes: Any):
            processes.append(command)
            if len(processes) == 3:
                raise OSError("no more processes")
            self.stdin = io.BytesIO()

        def poll(self) -> int:
            return 1

        def kill(self) -> None:
            """It has ended."""

        wait = kill

    monkeypatch.setattr(warmup.subprocess, "Popen", Process)
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    return processes


def test_shares_that_nobody_makes_are_left_to_the_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Any]
) -> None:
    needs = warmup.Needs(open_packed(DEMO).config, INT8_ROWS, ArchSpec(90, 132))
    specs = needs.specs()
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "4")
    warmup.compile_together(needs, specs, print)  # of four processes one cannot be started
    assert len(started) == 4
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "0")
    warmup.compile_together(needs, specs, print)
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "8")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "file"))  # nothing can be kept there
    warmup.compile_together(needs, specs, print)
    assert len(started) == 4
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", "many")
    with pytest.raises(BackendError, match="BITNET_NUMBA_COMPILERS must be a number of processes, not 'many'"):
        warmup.compile_together(needs, specs, print)


@pytest.mark.parametrize(("processes", "batches"), [("8", True), ("7", False)])
def test_many_processes_get_what_batches_need_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: str, batches: bool
) -> None:
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BITNET_NUMBA_COMPILERS", processes)
    compiled: list[set[str]] = []
    loaded: list[set[str]] = []
    names = lambda specs: {spec.name for spec in specs}  # noqa: E731
    monkeypatch.setattr(warmup, "compile_together", lambda needs, specs, _: compiled.append(names(needs.specs())))
    monkeypatch.setattr(warmup, "load_kernels", lambda specs, arch, progress: loaded.append(names(specs)))
    device: Any = DryRunDevice(90, 132)
    device.name = "card"
    config = open_packed(DEMO).config
    assert warmup.load_specs(config, INT8_ROWS, device, ahead=256) == (256 if batches else 0)
    assert warmup.load_specs(config, INT8_ROWS, device, 64) == 64
    assert loaded == compiled
    context, batch = loaded
    assert (batch <= context) == batches


@pytest.mark.parametrize(("slots", "rows"), [(32, INT8_ROWS), (400, RowFormats("bf16", "bf16"))])
def test_dry_run_of_a_batch_asks_for_the_kernels_of_all_its_graphs(slots: int, rows: RowFormats) -> None:
    config, target = replace(open_packed(DEMO).config, num_layers=1), ArchSpec(90, 132)
    device = DryRunDevice(target.arch, target.num_sms)
    model = CudaModel.dry_run(config, rows, device)
    steps = BatchSteps(model, SequenceState(device, config, 4096, slots, 1))
    for num_tokens in step_sizes(slots):
        steps.choose(num_tokens)
        for num_blocks in steps.block_counts(num_tokens):
            steps.decode(num_tokens, num_blocks)
    # What `CudaBatch.step` may need of them.
    for count in (1, 5, slots // 2, slots - 1, slots):
        for splits in range(1, max_splits_of(4096) + 1):
            entries = len(work_entries([splits] * count))
            assert padded_size(entries, step_size(count)) in steps.block_counts(step_size(count))
            assert entries <= steps.work_list.size
    needed = warmup.Needs(replace(config, max_context=4096), rows, target, slots).specs()
    assert {spec.name for spec in device.specs} == {spec.name for spec in needed}


def test_sizes_of_steps() -> None:
    """Beyond 256 sequences, twice as many rows would take far longer than those that are there."""
    assert step_sizes(5) == [1, 2, 4, 8] and step_sizes(256)[-2:] == [128, 256]
    assert step_sizes(400) == [*step_sizes(256), 288, 320, 352, 384, 416]
    for count in range(1, 513):
        size = step_size(count)
        assert count <= size in step_sizes(count) and (size < 2 * count if count <= 256 else size < count + 32)


def test_ternary_rows_take_the_kernels_of_ternary_products() -> None:
    config = ModelConfig.from_hf(PRESETS["bonsai-1.7b"][1])
    for most in (None, 8):
        needs = warmup.Needs(config, RowFormats("ternary", "ternary"), ArchSpec(90, 132), most)
        names = [spec.name for spec in needs.specs()]
        assert not any(name.startswith("lm_head") for name in names)
        assert any(name.startswith("gemv_groups" if most is None else "gemm_groups") for name in names)
        assert any(name.startswith("embed_token") and "ternary" in name for name in names)


@pytest.mark.parametrize("slots", [8, 256, 512])
def test_memory_of_a_batch_is_counted_before_its_pages_are(slots: int) -> None:
    """With what requests ask for later: there must be room for that beside the pages."""
    taken = 0

    class Counting(DryRunDevice):
        def empty(self, size: int, dtype: Any) -> Any:
            nonlocal taken
            taken += size * np.dtype(dtype).itemsize
            return super().empty(size, dtype)

        def zeros(self, size: int, dtype: Any) -> Any:
            return self.empty(size, dtype)

    config = ModelConfig.from_hf(PRESETS["2b-4t"][1] | {"quantization_config": {"quant_method": "bitnet"}})
    device, rows = Counting(90, 132), RowFormats("bf16", "bf16")
    model = CudaModel.dry_run(replace(config, num_layers=1), rows, device)
    page = page_bytes(model.config, model.kv_dtype)
    taken = 0
    state = SequenceState(device, model.config, 4096, slots, 1)
    BatchSteps(model, state)
    Extras(model, state, step_size(slots))
    counted = fixed_bytes(config, slots, 4096, model.kv_dtype)
    assert 0.98 * (taken - page) - (1 << 22) <= counted <= taken - page + (1 << 22)
