"""Models by name: one download, one conversion, whatever happens meanwhile. Nothing here needs a network."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from bitnet_numba.checkpoint.convert import Report, convert
from bitnet_numba.checkpoint.install import replacing
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.cli.models import run as models_command
from bitnet_numba.engine.loading import load
from bitnet_numba.errors import BitNetError, CheckpointError, RequestError
from bitnet_numba.hub import download, fetch, store
from bitnet_numba.hub.names import HubModel, hub_model
from tests.conftest import edit_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-bitnet"
MODEL = hub_model(NAME)


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for models."""
    monkeypatch.setenv("BITNET_NUMBA_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def hub(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A hub that has one model. What was asked for is added to the list."""
    asked: list[dict[str, object]] = []
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(tiny_source, snapshot)

    def snapshot_download(name: str, **options: object) -> str:
        asked.append({"name": name, **options})
        if name != NAME:
            raise OSError("nothing\nlike that")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(download, "why_not_reachable", lambda model: None)
    return asked


def in_hugging_face_cache(source: Path, cache: Path) -> None:
    """Lays a folder out as huggingface_hub's cache holds a downloaded repository."""
    repository = cache / ("models--" + NAME.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(source, repository / "snapshots" / COMMIT)


def test_downloaded_and_converted_once(hub: list[dict[str, object]], tiny_packed: Path) -> None:
    with load(NAME, "reference") as llm, load(str(tiny_packed), "reference") as same:
        assert llm.generate([1, 2, 3], max_new_tokens=4).text == same.generate([1, 2, 3], max_new_tokens=4).text
    load(NAME, "reference").close()
    load(NAME, "reference", revision="main").close()
    assert len(hub) == 1, "the second time, nobody is asked"
    assert hub[0]["revision"] == "main" and "*.safetensors" in str(hub[0]["allow_patterns"])
    (stored,) = store.stored_models()
    assert (stored.model, stored.commit, stored.complete) == (MODEL, COMMIT, True)
    assert stored.nbytes > sum(path.stat().st_size for path in tiny_packed.iterdir())


def test_each_revision_is_a_model(hub: list[dict[str, object]]) -> None:
    main, other = fetch.find_model(NAME), fetch.find_model(NAME, "refs/pr/1")
    assert main != other and open_packed(main).config == open_packed(other).config
    assert [asked["revision"] for asked in hub] == ["main", "refs/pr/1"]


def test_the_last_use_is_noted(hub: list[dict[str, object]]) -> None:
    fetch.fetch(MODEL)
    os.utime(store.packed_folder(MODEL).parent / "origin.json", (1e9, 1e9))
    (before,) = store.stored_models()
    fetch.fetch(MODEL)
    (after,) = store.stored_models()
    assert before.last_used == 1e9 and after.last_used is not None and after.last_used > 1.5e9


def test_what_the_conversion_noted_is_kept(hub: list[dict[str, object]], tmp_path: Path) -> None:
    edit_config(tmp_path / "snapshots" / COMMIT, unheard_of=3)
    fetch.fetch(MODEL)
    assert any("unheard_of" in note for note in store.stored_models()[0].notes)
    (store.packed_folder(MODEL).parent / "origin.json").write_text('{"commit": 3, "notes": {"a": 1}}')
    assert store.stored_models()[0].notes == () and store.stored_models()[0].commit is None


def test_a_full_disk_costs_only_the_notes(hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.json, "dump", full)
    target = fetch.fetch(MODEL)
    open_packed(target)
    assert os.listdir(target.parent) == ["model"], "no half-written file is left"


def test_a_damaged_model_is_named_by_what_was_downloaded(hub: list[dict[str, object]], tmp_path: Path) -> None:
    """And not by the folder that was being written, which is gone."""
    broken = tmp_path / "snapshots" / COMMIT / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(BitNetError) as caught:
        fetch.fetch(MODEL)
    assert str(caught.value).startswith(f"{broken} is damaged: ")


def test_another_format_is_converted_again(hub: list[dict[str, object]]) -> None:
    config = fetch.fetch(MODEL) / "config.json"
    config.write_text(config.read_text().replace('"format": ', '"format": 99'))
    open_packed(fetch.fetch(MODEL))
    assert len(hub) == 2


def test_an_unknown_model(hub: list[dict[str, object]], models: Path) -> None:
    with pytest.raises(CheckpointError, match="^someone/else is not a local folder and could not be downloaded: noth"):
        load("someone/else")
    with pytest.raises(RequestError, match="no revisions"):
        load(revision="main")
    with pytest.raises(RequestError, match="not a revision"):
        load(NAME, revision="../..")
    with pytest.raises(CheckpointError, match="2b4 does not exist; did you mean 2b4t"):
        load("2b4")
    assert not models.exists()


def test_offline(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What Hugging Face's cache holds is used, and that is said; what it does not hold is one line."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"could not be downloaded: offline \(HF_HUB_OFFLINE is set\)$"):
        fetch.fetch(MODEL)
    in_hugging_face_cache(tiny_source, tmp_path / "cache")
    open_packed(fetch.fetch(MODEL))
    assert [record.getMessage() for record in caplog.records] == [
        f"{NAME} is taken from the Hugging Face cache as it is: offline (HF_HUB_OFFLINE is set)"
    ]
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        fetch.fetch(hub_model(NAME, "v9"))


def test_without_a_network(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("[Errno -2] Name or\nservice not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    in_hugging_face_cache(tiny_source, tmp_path / "cache")
    open_packed(fetch.fetch(MODEL))
    assert "the hub cannot be reached: [Errno -2] Name or service not known" in caplog.text


def test_a_model_that_cannot_run_leaves_nothing_usable(hub: list[dict[str, object]], tmp_path: Path) -> None:
    (tmp_path / "snapshots" / COMMIT / "config.json").write_text('{"architectures": ["Other"]}')
    for _ in range(2):
        with pytest.raises(BitNetError):
            fetch.fetch(MODEL)
    assert not any(stored.complete for stored in store.stored_models())


def test_a_refusal_amid_a_conversion_leaves_nothing_to_list(hub: list[dict[str, object]], tmp_path: Path) -> None:
    (tmp_path / "snapshots" / COMMIT / "tokenizer.json").unlink()
    with pytest.raises(BitNetError, match="has no tokenizer"):
        fetch.fetch(MODEL)
    assert store.stored_models() == []


def test_a_cache_folder_that_cannot_be_written(hub: list[dict[str, object]], models: Path) -> None:
    models.write_text("a file")
    with pytest.raises(CheckpointError, match="^cannot write .*models.*; set BITNET_NUMBA_MODELS to "):
        fetch.fetch(MODEL)


def test_waits_for_another_process(
    hub: list[dict[str, object]], tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = store.packed_folder(MODEL)

    def finish(seconds: float) -> None:
        for path in tiny_packed.iterdir():
            shutil.copy(path, writing)
        other.__exit__(None, None, None)

    other = replacing(target, lambda: None)
    writing = other.__enter__()
    monkeypatch.setattr(time, "sleep", finish)
    open_packed(fetch.fetch(MODEL))
    assert [record.getMessage() for record in caplog.records] == [
        f"another process is converting {NAME}; waiting for it"
    ]


def test_another_process_that_is_faster(hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has written the model between the look at the folder and the lock."""

    def convert_twice(source: Path, target: Path, force: bool, progress: object) -> Report:
        convert(source, target)
        return convert(source, target, force=force)

    monkeypatch.setattr(fetch, "convert", convert_twice)
    open_packed(fetch.fetch(MODEL))


CHILD = f"""
import sys
from bitnet_numba.hub import download, fetch
from bitnet_numba.hub.names import hub_model
from pathlib import Path
fetch.download = lambda model: Path(sys.argv[1])
print(fetch.fetch(hub_model({NAME!r})))
"""


@pytest.fixture
def child(tiny_source: Path) -> Callable[[], "subprocess.Popen[str]"]:
    """Starts a process that fetches the model."""
    command = [sys.executable, "-c", CHILD, str(tiny_source)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return lambda: subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def test_two_processes_and_a_killed_one(child: Callable[[], "subprocess.Popen[str]"], models: Path) -> None:
    target = store.packed_folder(MODEL)
    killed = child()
    while killed.poll() is None and not any(target.parent.glob(".model*")):
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not target.exists() or open_packed(target)
    both = [child(), child()]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, f"{target}\n"), err
    open_packed(target)
    assert sorted(os.listdir(target.parent)) == ["model", "origin.json"], "and nothing is left of the killed one"


def test_removing(hub: list[dict[str, object]], models: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetch.fetch(MODEL)
    fetch.fetch(hub_model(NAME, "v1"))
    with replacing(store.packed_folder(MODEL), lambda: None):
        with pytest.raises(CheckpointError, match="another conversion is writing"):
            store.remove(store.find(MODEL)[0])
    for stored in store.find(MODEL, any_revision=True):
        store.remove(stored)
    assert store.stored_models() == [] and os.listdir(models) == []
    with pytest.raises(CheckpointError, match=f"{NAME} is not in "):
        store.find(MODEL)


def test_foreign_folders_are_no_models(models: Path) -> None:
    for name in ("a--b/..x/model", "notes/main/model", ".hidden/main", "a--b--c/main", "a--b/%zz"):
        (models / name).mkdir(parents=True)
    assert store.stored_models() == []


def test_where_models_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.cache_folder() == tmp_path / "models"
    monkeypatch.delenv("BITNET_NUMBA_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "bitnet-numba" / "models"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CheckpointError, match="set BITNET_NUMBA_MODELS"):
        store.cache_folder()


def test_gguf_files_are_converted_once_and_again_when_they_change(tmp_path: Path, hub: list[dict[str, object]]) -> None:
    golden = Path(__file__).parent.parent / "golden" / "gguf" / "bitnet-relu2-i2_s.gguf"
    file = tmp_path / "odd name (1).gguf"
    shutil.copyfile(golden, file)
    convert(golden, tmp_path / "packed")
    with load(tmp_path / "packed", "reference") as llm:
        expected = llm.generate([1, 2, 3], max_new_tokens=4).token_ids
    for _ in range(2):
        for path in (file, str(file)):
            with load(path, "reference") as llm:
                assert llm.generate([1, 2, 3], max_new_tokens=4).token_ids == expected
    (stored,) = store.stored_models()
    assert stored.model.name.startswith("gguf/odd-name-1-") and stored.complete
    os.utime(file, (1, 1))
    load(file, "reference").close()
    assert len(store.stored_models()) == 2 and not hub


def test_gguf_files_of_the_hub(tmp_path: Path, hub: list[dict[str, object]]) -> None:
    golden = Path(__file__).parent.parent / "golden" / "gguf" / "bitnet-relu2-i2_s.gguf"
    shutil.copyfile(golden, tmp_path / "snapshots" / COMMIT / "m.gguf")
    load(f"{NAME}/m.gguf", "reference", revision="v1").close()
    assert hub[0]["revision"] == "v1" and hub[0]["allow_patterns"] == ["m.gguf"]
    for name, reason in (
        (f"{NAME}/n.gguf", "has no file n.gguf"),
        ("none.gguf", "none.gguf cannot be opened: No such file"),
        ("a\0.gguf", "path must be the name of a folder"),
    ):
        with pytest.raises(BitNetError, match=reason) as caught:
            load(name, "reference")
        assert str(caught.value).isprintable()
    with pytest.raises(BitNetError, match="a revision needs a hub id"):
        load(str(golden), "reference", revision="v1")


def test_a_converted_gguf_file_of_the_hub_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it lies in Hugging Face's cache, the hub is asked only if the file was not converted yet."""
    asked = []

    def why_not_reachable(model: HubModel) -> str:
        asked.append(model)
        return "no network"

    monkeypatch.setattr(download, "why_not_reachable", why_not_reachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repository").mkdir()
    shutil.copyfile(
        Path(__file__).parent.parent / "golden" / "gguf" / "bitnet-relu2-i2_s.gguf", tmp_path / "repository" / "m.gguf"
    )
    in_hugging_face_cache(tmp_path / "repository", tmp_path / "cache")
    name = f"{NAME}/m.gguf"
    folders = [fetch.find_model(name) for _ in range(2)]
    assert folders[0] == folders[1] and asked == [MODEL]
    assert models_command(["path", name]) == 0 and capsys.readouterr().out == f"{folders[0]}\n"
    assert models_command(["rm", name]) == 0 and asked == [MODEL]
    fetch.find_model(name)
    assert asked == [MODEL, MODEL]
    for other in (f"{NAME}/../m.gguf", f"{NAME}/none.gguf", "someone/else/m.gguf"):
        assert fetch.downloaded_gguf(other) is None
    assert fetch.downloaded_gguf(name, "v9") is None
