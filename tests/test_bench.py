"""The benchmarks: the ladder from a plain loop to the GEMV, as far as a dry run goes; how the CPU's cases are timed."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_numba.backends.cpu.backend import CpuPool
from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.checkpoint.packed import PackedCheckpoint, RowFormat, open_packed
from bitnet_numba.engine.loading import DEMO
from bitnet_numba.errors import RequestError
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.memory import DeviceView
from bitnet_numba.packing import BLOCK_ROWS, packed_words
from tests.engine.toy_backend import toy_engine
from tools import bench
from tools.benchmarks import cpu, engine, groups, kernels, serve_engine
from tools.benchmarks.cpu_read import StreamingRead, read_sum
from tools.benchmarks.inputs import row_formats, write_random_packed
from tools.benchmarks.table import group_table, ladder_table, table
from tools.make_checkpoint import PRESETS

COPIES, US = 3, 2.5


class FakeStream:
    handle = 0

    def synchronize(self) -> None:
        pass


def test_ladder_launches_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step covers every row of every matrix, each launch with another matrix; the table has a line for each."""
    device = DryRunDevice(90, 132)
    device.l2_bytes = 0  # type: ignore[attr-defined]
    simple: list[tuple[Any, ...]] = []

    def numba_launches(device: Any, kernel: Any, blocks: int, threads: int, *matrix: Any) -> list[Any]:
        simple.append((kernel, blocks, threads, *matrix[1:3]))
        return [lambda handle: None] * matrix[-1]

    monkeypatch.setattr(kernels, "numba_launches", numba_launches)
    monkeypatch.setattr(kernels, "graph_us", lambda stream, launches: US * len(launches))
    monkeypatch.setattr(kernels, "cold_copies", lambda nbytes, l2_bytes: COPIES)
    monkeypatch.setattr(kernels, "random_words", lambda count: np.broadcast_to(np.int32(0), count))
    rungs = kernels.measure_ladder(device, FakeStream())  # type: ignore[arg-type]

    assert [(rung["N"], rung["K"]) for rung in rungs] == kernels.SHAPES_2B4T
    for kernel, blocks, threads, N, _ in simple:
        assert blocks * (BLOCK_ROWS if kernel is kernels.four_rows_at_a_time else threads) >= N
    steps = [name for name, *_ in kernels.LADDER] + [kernels.FAST, kernels.FAST_PDL]
    assert all(rung["us"] == dict.fromkeys(steps, US) for rung in rungs)
    lines = [line for line in ladder_table({"ladder": rungs, "bandwidth_GB/s": 4000.0}) if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {step}" for step in [*steps, "only reading the weights"]
    ]
    assert lines[2].endswith(" | 2.50 (1769) |")  # 2560 x 6912: 4.4 MB in 2.5 us
    assert ladder_table({"products": []}) == []  # figures of earlier versions


def test_group_scales_are_measured_on_the_same_products() -> None:
    """Each launch has another matrix; the table has a line for each shape, and the ratio."""
    device = DryRunDevice(90, 132)
    found = list(groups.cases(device))
    assert [(case.N, case.K, case.M) for case in found] == [
        (N, K, M) for N, K, _ in groups.SHAPES for M in groups.TOKENS
    ]
    for case in found:
        assert len(case.one) == len(case.groups) >= 20
        assert "groups" in case.groups[0].name and "groups" not in case.one[0].name
    rows = [{"N": N, "K": K, "M": M, "one_us": 2.0, "groups_us": 2.5 + M} for N, K in ((8, 9), (7, 9)) for M in (1, 8)]
    lines = group_table(rows)
    assert lines[-2:] == ["| 8 x 9 | 3.50 (1.75) | 10.50 (5.25) |", "| 7 x 9 | 3.50 (1.75) | 10.50 (5.25) |"]
    assert "| N x K | 1 token | 8 tokens |" in lines


def test_ladder_gives_each_launch_of_the_gemv_another_matrix() -> None:
    N, K = 48, 64
    nbytes = 4 * packed_words(N, K)
    launches = kernels.gemv_launches(
        DryRunDevice(90, 132), DeviceView(4096, COPIES * nbytes // 4, np.int32), N, K, COPIES, use_pdl=False
    )
    assert [launch.arguments[0].address for launch in launches] == [4096 + i * nbytes for i in range(COPIES)]


def test_streaming_read_reads_every_byte_once() -> None:
    """The sums of each column are those of NumPy, and nothing before or behind the part is in them."""
    memory = np.random.default_rng(0).integers(-1000, 1000, 16 * 64, np.int32)
    sums = (ctypes.c_int32 * 16)()
    read_sum(memory.ctypes.data + 1024, 1024, ctypes.addressof(sums))
    assert list(sums) == memory[256:512].reshape(-1, 16).sum(0).tolist()


@pytest.mark.parametrize("threads", [1, 3])
def test_streaming_read_counts_what_it_reads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, int]] = []
    monkeypatch.setattr("tools.benchmarks.cpu_read.read_sum", lambda address, n, sums: parts.append((address, n)))
    memory = np.ones(3000, np.int32)
    read = StreamingRead(memory, 2)
    read.seconds(threads)
    read.close()
    assert sum(n for _, n in parts) == read.nbytes(threads)
    own = sorted(set(parts))
    assert len(own) == threads and all(a + n <= b for (a, n), (b, _) in zip(own, own[1:], strict=False))
    assert memory.ctypes.data <= own[0][0] and sum(own[-1]) <= memory.ctypes.data + memory.nbytes


def small_pool(num_pages: int) -> CpuPool:
    """Pages of the built-in model, full of zeros."""
    pool = CpuPool(open_packed(DEMO).config, num_pages, np.dtype(np.uint16))
    pool.memory[:] = 0
    return pool


class FakeModel:
    """Counts what it is asked for."""

    threads, token = 2, 5

    def __init__(self, page_bytes: int) -> None:
        self.isa = type("ISA", (), {"name": "portable"})()
        self.bytes, self.calls = page_bytes, list[tuple[str, int, list[int]]]()

    def new_pool(self, num_pages: int) -> CpuPool:
        self.pool = small_pool(num_pages)
        return self.pool

    def page_bytes(self) -> int:
        return self.bytes

    def step(self, ids: list[int], caches: list[Any]) -> np.ndarray:
        self.calls.append(("step", len(ids), [cache.length for cache in caches]))
        pages = [page for cache in caches for page in cache.table]
        assert len(set(pages)) == len(pages), "sequences share pages"
        for cache in caches:
            cache.length += 1
            assert cache.length <= 64 * len(cache.table)
        return np.zeros((len(ids), 4), np.float32)

    def forward(self, ids: list[int], cache: Any) -> np.ndarray:
        self.calls.append(("forward", len(ids), [cache.length]))
        cache.length += len(ids)
        return np.zeros((len(ids), 4), np.float32)

    def sample(self, hidden: np.ndarray, histories: Any, params: Any, prompt_lengths: Any) -> list[int]:
        assert len(hidden) == len(histories) == len(params) == len(prompt_lengths)
        return [self.token] * len(hidden)


@pytest.fixture
def fake(demo: PackedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[cpu.Measured, FakeModel]:
    model = FakeModel(64 * 4)
    monkeypatch.setattr(cpu, "CpuModel", lambda *args: model)
    measured = cpu.Measured("demo", demo)
    measured.open(["portable"], [2])
    return measured, model


def test_a_window_of_decoding(fake: tuple[cpu.Measured, FakeModel], demo: PackedCheckpoint) -> None:
    """Steps begin at the context every time, and never pass the model's end; bytes are those of one step."""
    measured, model = fake
    assert model.pool.memory[-4096:].any(), "keys and values that nobody wrote are in the cache"
    case = measured.decode(model, [128, 128])  # type: ignore[arg-type]
    case.window(), case.window()
    assert model.calls == 2 * [("step", 2, [128 + i] * 2) for i in range(cpu.STEPS)]
    assert case.labels["bytes"] == demo.nbytes() + 2 * 128 * 4  # tied: the embedding is the head
    model.calls.clear()
    measured.decode(model, [demo.config.max_context]).window()  # type: ignore[arg-type]
    assert model.calls[-1] == ("step", 1, [demo.config.max_context - 1])
    model.token = NO_TOKEN
    with pytest.raises(AssertionError, match="NaN"):
        case.window()


@pytest.mark.parametrize("head", ["ternary", "int8"])
def test_bytes_that_a_step_reads_of_an_untied_model(
    head: RowFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the embedding, whatever its rows are."""
    weight_format, config = PRESETS["tiny-llama"]
    monkeypatch.setitem(PRESETS, "small", ("floats" if head == "ternary" else weight_format, config))
    write_random_packed(tmp_path / "packed", head, "small")
    checkpoint = open_packed(tmp_path / "packed")
    specs = checkpoint.file.specs
    rows = ("embed.words", "embed.scales") if head == "ternary" else ("embed.weight", "embed.scale")
    measured = cpu.Measured("small", checkpoint)
    assert measured.weight_bytes == checkpoint.nbytes() - sum(specs[name].nbytes for name in rows)


def test_a_window_of_a_prompt(fake: tuple[cpu.Measured, FakeModel]) -> None:
    """Passes of a page, from an empty context every time; the sampler is a part of its own."""
    measured, model = fake
    case = measured.prompt(model, 150)  # type: ignore[arg-type]
    case.window()
    assert len(case.window()) == 4
    assert model.calls == 2 * [("forward", 64, [0]), ("forward", 64, [64]), ("forward", 22, [128])]


def test_caches_are_written() -> None:
    """Memory that was never written would be one page of zeros that stays in the cache."""
    pool = small_pool(5)
    cpu.fill(pool)
    numbers = pool.memory.view(np.uint16)
    assert (numbers.reshape(-1, 8) != 0).any(1).all()
    assert np.isfinite((numbers.astype(np.uint32) << 16).view(np.float32)).all()


def test_cases_take_turns_and_are_judged_by_their_parts() -> None:
    order: list[str] = []
    times = {"a": iter([[1.0, 9.0], [5.0, 2.0], [3.0, 4.0]]), "b": iter([[7.0]] * 3)}
    cases = [cpu.Case({}, lambda n=n: order.append(n) or next(times[n])) for n in times]  # type: ignore[misc]
    cpu.take_turns(cases, 0)
    assert order == ["a", "b"] * cpu.MIN_ROUNDS
    assert (cases[0].best, cases[0].median) == (1.0 + 2.0, 3.0 + 4.0)


def test_cpu_figures_and_table(fake: tuple[cpu.Measured, FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's rates are those of its times, and its share is that of the read by as many threads."""
    monkeypatch.setattr(cpu, "ones", lambda: np.ones(1 << 12, np.int32))
    monkeypatch.setattr(cpu, "mapped_read", lambda checkpoint: StreamingRead(np.ones(1 << 12, np.int32), 1))
    measured, _ = fake
    part = cpu.measure_part("decode", [measured], ["portable"], [2], 0)
    rows = part["rows"]
    assert [r["context"] for r in rows] == [128, 1024]  # the built-in model has no 4096
    assert [(r["of"], r["threads"]) for r in part["read"]] == [("memory", 2), ("demo", 2)]
    read = part["read"][0]
    for r in rows:
        assert r["tokens/s"] == pytest.approx(1e3 / r["ms"])
        assert r["GB/s"] == pytest.approx(r["bytes"] / r["ms"] / 1e6)
        assert r["share_of_read"] == pytest.approx(r["GB/s"] / read["GB/s"])
        assert r["median_share_of_read"] == pytest.approx(r["bytes"] / r["median_ms"] / 1e6 / read["median_GB/s"])
        assert r["ms"] <= r["median_ms"]
    batch = cpu.measure_part("batch", [measured], ["portable"], [2], 0)["rows"]
    assert [r["tokens/s"] * r["ms"] / 1e3 for r in batch] == pytest.approx(cpu.BATCHES)
    environment = {"device": "a CPU", "cores": 2, "python": "3", "versions": {"numba": "1"}, "commit": "abc"}
    figures = {"cpu": {"environment": environment, "date": "2000-01-01", "decode": part}}
    lines = table(json.loads(json.dumps(figures))).splitlines()
    assert lines[0] == "a CPU, 2 cores, Python 3, numba 1; commit abc, 2000-01-01."
    rows_shown = [line for line in lines if line.startswith("| demo | int8 | portable | 2 |")]
    assert len(rows_shown) == 2 and f"{rows[0]['share_of_read']:.0%}" in rows_shown[0]


def test_an_interrupted_run_loses_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_part(part: str, *arguments: Any) -> dict[str, Any]:
        if part == "batch":
            raise KeyboardInterrupt
        return {"rows": []}

    monkeypatch.setattr(cpu, "measure_part", measure_part)
    saved: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        cpu.measure_cpu({}, [], [], ("decode", "prompts", "batch"), 1, lambda figures: saved.append(list(figures)))
    assert saved == [["date", "decode"], ["date", "decode", "prompts"]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["cpu", "--isa", "mmx", "DEMO"], "instruction set 'mmx' is not one of this machine's"),
        (["cpu", "--parts", "decode", "nowhere"], "nowhere does not exist"),
        (["cpu", "--threads", "1,0", "DEMO"], "must be between 1 and"),
        (["cpu", "--threads", "two"], "--threads"),
        (["cpu", "--parts", "decode,load"], "choose from decode, prompts, batch, demo"),
        (["cpu", "--seconds", "nan"], "must be a positive number"),
        (["packing", "DEMO"], "takes no checkpoint"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, demo: PackedCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and exit code 2."""
    arguments = [str(demo.folder) if argument == "DEMO" else argument for argument in arguments]
    try:
        code = bench.main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert code == 2 and message in shown.err and shown.out == ""


def test_engine_answers_what_is_asked_and_has_a_line_for_each_case() -> None:
    llm, _ = toy_engine()
    sizes = engine.Sizes(3, 5, 4, 2, 6, (2, 9), 3, 4, 2)
    figures = engine.measure_engine(llm, sizes)
    assert [row["tokens"] for row in figures["rows"]] == [3 * 4, 3 * 4, 3 * 4, 2 * 4, 2 * 4, 6 * 3, 4]
    assert all(row["device_s"] is None for row in figures["rows"]), "there is no GPU"
    stalls = figures["stalls"]
    assert stalls["longest_ms"] >= stalls["p99_ms"] >= stalls["median_ms"] > 0 < stalls["alone_ms"]
    assert stalls["running"] == 2 and stalls["rounds"] > 0
    figures["environment"] = {"device": "toy", "python": "3", "commit": "unknown"}
    lines = [line for line in table({"engine": figures}).splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row['case']}" for row in figures["rows"]]


@pytest.mark.parametrize(
    "arguments",
    [["engine", "a", "b"], ["batch", "a"], ["groups", "--preset", "3b"], ["cpu", "--small"], ["engine", "--isa", "x"]],
)
def test_options_of_another_part_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and f"{arguments[0]} takes" in capsys.readouterr().err


def test_a_packed_checkpoint_of_any_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_format, raw = PRESETS["bonsai-1.7b"]
    small = raw | {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 384, "vocab_size": 300}
    monkeypatch.setitem(PRESETS, "bonsai-1.7b", (weight_format, small))
    (head,) = row_formats("bonsai-1.7b")
    write_random_packed(tmp_path / "model", head, "bonsai-1.7b")
    checkpoint = open_packed(tmp_path / "model")
    assert checkpoint.config.group_scales and checkpoint.config.qk_norm and checkpoint.head == "ternary"
    assert row_formats("2b-4t") == ("bf16", "int8")


def test_the_engines_own_rate_is_of_the_servers_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def load(*arguments: Any, **options: Any) -> None:
        given.extend((*arguments, options))
        raise RequestError("enough")

    monkeypatch.setattr(serve_engine, "load_model", load)
    with pytest.raises(RequestError, match="enough"):
        serve_engine.main(
            ["--backend=cpu", "--context=99", "--threads=1", "--kv-dtype=float32", "--activations=int8x2"]
        )
    options = {"backend": "cpu", "context": 99, "threads": 1, "kv_dtype": "float32", "activations": "int8x2"}
    assert given == [None, {"revision": None, **options}]


def test_the_readme_has_the_speed_up_that_was_measured() -> None:
    folder = Path(__file__).parent.parent
    products = json.loads((folder / "docs" / "benchmarks.json").read_text())["kernels"]["products"]
    speed_ups = [p["cublas_bf16_us"] / p["us"] for p in products if p["cublas_bf16_us"]]
    expected = f"{min(speed_ups):.1f} to {max(speed_ups):.1f} times as fast as cuBLAS"
    assert expected in " ".join((folder / "README.md").read_text().split())
