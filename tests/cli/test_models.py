"""`bitnet-numba models`: what it shows and deletes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_numba.cli.main import main
from bitnet_numba.hub import store
from bitnet_numba.hub.fetch import find_model
from bitnet_numba.hub.names import KNOWN, hub_model
from tests.conftest import GOLDEN

Run = Callable[..., tuple[int, str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `bitnet-numba models` with a folder of its own: (exit code, standard output, standard error)."""
    monkeypatch.setenv("BITNET_NUMBA_MODELS", str(tmp_path / "models"))
    return lambda *arguments: (main(["models", *arguments]), *capsys.readouterr())


@pytest.fixture
def stored(run: Run, tiny_packed: Path) -> Path:
    """The folder of models, with two revisions of one model."""
    for revision in (None, "refs/pr/1"):
        model = hub_model("someone/tiny", revision)
        shutil.copytree(tiny_packed, store.packed_folder(model))
        store.record(model, COMMIT, ["config.json: a note"])
    return store.cache_folder()


def test_nothing_there(run: Run, tmp_path: Path) -> None:
    assert run("list") == (0, f"no models in {tmp_path / 'models'}; see  bitnet-numba models list --known\n", "")
    assert run("list", "--json") == (0, "[]\n", "")
    assert run("path") == (0, f"{tmp_path / 'models'}\n", "")
    for command in ("show", "path", "rm"):
        code, out, err = run(command, "2b4t")
        assert (code, out) == (2, "")
        assert err == f"bitnet-numba models: microsoft/bitnet-b1.58-2B-4T is not in {tmp_path / 'models'}\n"
        assert "did you mean 2b4t?" in run(command, "2b4")[2]


def test_known(run: Run) -> None:
    code, out, _ = run("list", "--known")
    assert code == 0 and all(short in out and name in out for short, (name, _) in KNOWN.items())
    assert json.loads(run("list", "--known", "--json")[1])["2b4t"] == "microsoft/bitnet-b1.58-2B-4T"


def test_list_and_show(run: Run, stored: Path) -> None:
    nbytes = sum(path.stat().st_size for path in stored.glob("someone--tiny/main/*/*"))
    nbytes += (stored / "someone--tiny/main/origin.json").stat().st_size
    code, out, _ = run("list")
    assert code == 0 and len(out.splitlines()) == 4 and f"{nbytes / 1e6:.2f} MB" in out.splitlines()[1]
    assert [line.split()[1] for line in out.splitlines()[1:3]] == ["main", "refs/pr/1"]
    listed = json.loads(run("list", "--json")[1])
    assert [(one["name"], one["revision"], one["commit"]) for one in listed] == [
        ("someone/tiny", "main", COMMIT),
        ("someone/tiny", "refs/pr/1", COMMIT),
    ]
    shown = json.loads(run("show", "someone/tiny", "--json")[1])
    assert shown == listed[0] | {
        "layers": 2,
        "hidden_size": 256,
        "vocabulary": shown["vocabulary"],
        "context": shown["context"],
        "head": "bf16",
    }
    out = run("show", "someone/tiny", "--revision", "refs/pr/1")[1]
    assert out.endswith("note         config.json: a note\n")
    assert COMMIT in out and str(stored / "someone--tiny" / "refs%2Fpr%2F1" / "model") in out
    (stored / "someone--tiny/main/model/model.safetensors").write_bytes(b"damaged")
    code, out, _ = run("show", "someone/tiny")
    assert code == 0 and "\nproblem " in out, "a damaged model can be looked at, too"


def test_a_gguf_file_is_shown_by_what_it_was_made_from(run: Run, tiny_packed: Path) -> None:
    model = hub_model("gguf/tiny-0123456789ab")
    shutil.copytree(tiny_packed, store.packed_folder(model))
    store.record(model, "tiny.gguf")
    code, out, _ = run("show", "gguf/tiny-0123456789ab")
    assert code == 0 and "\nmade from    tiny.gguf\n" in out and "\ncommit" not in out


def test_a_gguf_file_goes_by_its_own_name(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    shutil.copyfile(GOLDEN / "gguf" / "bitnet-relu2-i2_s.gguf", file)
    code, out, err = run("path", str(file))
    assert (code, out) == (2, "") and " is not in " in err and err.count("\n") == 1
    folder = find_model(file)
    assert run("path", str(file))[:2] == (0, f"{folder}\n")
    assert "\nmade from    m.gguf\n" in run("show", str(file))[1]
    assert "a revision needs a hub id" in run("path", str(file), "--revision", "v1")[2]
    code, out, _ = run("rm", str(file))
    assert code == 0 and out.startswith("deleted gguf/m-") and file.exists() and not folder.exists()
    assert "m.gguf cannot be opened: No such file" in run("rm", str(tmp_path / "no" / "m.gguf"))[2]


def test_path_and_rm(run: Run, stored: Path) -> None:
    assert run("path", "someone/tiny") == (0, f"{stored / 'someone--tiny' / 'main' / 'model'}\n", "")
    code, out, _ = run("rm", "someone/tiny", "--revision", "refs/pr/1")
    assert code == 0 and out.startswith("deleted someone/tiny (refs/pr/1), ")
    assert [model.model.revision for model in store.stored_models()] == ["main"]
    code, out, err = run("rm", "someone/tiny")
    assert code == 0 and out.startswith("deleted someone/tiny, ") and err.count("\n") == 1
    assert store.stored_models() == []


def test_nothing_is_deleted_if_one_name_is_wrong(run: Run, stored: Path) -> None:
    for wrong, message in (("someone/else", "someone/else is not in"), ("2b4", "did you mean 2b4t?")):
        code, out, err = run("rm", "someone/tiny", wrong)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert len(store.stored_models()) == 2
    code, out, _ = run("rm", "someone/tiny", "someone/tiny")
    assert code == 0 and out.count("deleted") == 2 and store.stored_models() == []


def test_another_revision_is_told(run: Run, stored: Path) -> None:
    run("rm", "someone/tiny", "--revision", "main")
    for command in ("show", "path"):
        code, out, err = run(command, "someone/tiny")
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert f"someone/tiny is in {stored} with --revision refs/pr/1, not with main" in err


def test_what_a_killed_conversion_has_left(run: Run, stored: Path) -> None:
    folder = stored / "someone--tiny" / "main"
    (folder / "model").rename(folder / ".model.bitnet-01234567")
    assert "unfinished" in run("list")[1]
    assert "its conversion was interrupted" in run("show", "someone/tiny")[2]
    assert run("rm", "someone/tiny")[0] == 0 and not folder.exists()


def test_names_that_lead_elsewhere(run: Run, stored: Path) -> None:
    for name in ("../..", "/", "", "someone/..", "."):
        code, out, err = run("rm", name)
        assert (code, out) == (2, "") and "is not the name of a model" in err
    assert "is not a revision" in run("rm", "someone/tiny", "--revision", "..")[2]
    assert len(store.stored_models()) == 2
