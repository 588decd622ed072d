"""Names of models, which become names of folders: whatever is given, nothing leads out of the cache folder."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitnet_numba.errors import CheckpointError, RequestError
from bitnet_numba.hub import store
from bitnet_numba.hub.fetch import as_hub_model, find_model
from bitnet_numba.hub.names import KNOWN, from_folders, hub_model, looks_like_hub_id

ODD = st.text(st.sampled_from("ab-.%/\\~\0é:2F "), max_size=8) | st.text(max_size=8)


@given(ODD, ODD | st.none())
@example("../..", None)
@example("a/..", None)
@example("..--/x", None)
@example("a/b", "..")
@example("a/b", "refs/../..")
@example("a/b", "/etc")
@example("a/b", "%2e%2e")
@example("a\\b/c", None)
@example("a--b/c", None)
@example("a/b", "")
def test_nothing_leads_out_of_the_cache_folder(name: str, revision: str | None) -> None:
    try:
        model = hub_model(name, revision)
    except RequestError as error:
        assert "\n" not in str(error)
        return
    root = os.path.abspath(store.cache_folder())
    path = os.path.normpath(os.path.join(root, *model.folders))
    assert Path(path).relative_to(root).parts == model.folders, "two names of folders, and no way out of them"
    assert from_folders(*model.folders) == model, "which name the model again"


def test_names_and_revisions_that_the_hub_has() -> None:
    for revision in ("main", "v1.0", "refs/pr/3", "8d0f1c", "release-2+fix"):
        model = hub_model("microsoft/bitnet-b1.58-2B-4T", revision)
        assert from_folders(*model.folders) == model
    assert hub_model("2b4t") == hub_model("microsoft/bitnet-b1.58-2B-4T") == hub_model("2b4t", "main")
    assert all(hub_model(name) == hub_model(short) for short, (name, _) in KNOWN.items())


@pytest.mark.parametrize(
    "revision", ["", "..", "a/../../b", "/etc/passwd", "-x", "a b", "a\0", "\n", "a\\b", "a" * 201]
)
def test_what_is_no_revision(revision: str) -> None:
    """Nor does it lead out of the cache of huggingface_hub, which makes paths of it, too."""
    with pytest.raises(RequestError, match="is not a revision"):
        hub_model("owner/name", revision)


def test_a_short_name_that_is_nearly_right() -> None:
    with pytest.raises(RequestError, match="'2b4' is not the name of a model.*did you mean 2b4t"):
        hub_model("2b4")


def test_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_hub_model("2b4t") == hub_model("2b4t") and as_hub_model("owner/name") == hub_model("owner/name")
    Path("2b4t").mkdir()
    Path("owner/name").mkdir(parents=True)
    for name in ("2b4t", "owner/name", Path("owner/other")):
        assert find_model(name) == Path(name)
        with pytest.raises(RequestError, match="a revision needs a hub id"):
            find_model(name, "main")
    Path("owner/name").rename("owner/.name.bitnet-old")  # where a killed conversion has left it
    assert find_model("owner/name") == Path("owner/name")
    Path("notes.txt").touch()
    for name in ("notes.txt", Path("notes.txt")):
        with pytest.raises(CheckpointError, match="^notes.txt is neither a folder nor a GGUF file, which ends in .gg"):
            find_model(name)
    assert find_model("no\0name") == Path("no\0name"), "opening it tells what is wrong"


@pytest.mark.parametrize(
    "name", ["./a", "a/b/c", "/a/b", "~/a", "a", "https://example.org/a", "a b/c", "a--b/c", "../a", "models/x.gguf"]
)
def test_what_is_no_hub_id(name: str) -> None:
    assert not looks_like_hub_id(name)
