"""Names of models: hub ids such as owner/name, and short names for well-known ones."""

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from bitnet_numba.errors import RequestError, printable, shown, suggestion

# Short name -> hub id, and the size of the packed checkpoint, about.
KNOWN = {
    "2b4t": ("microsoft/bitnet-b1.58-2B-4T", "1.2 GB"),
    "bonsai-1.7b": ("prism-ml/Ternary-Bonsai-1.7B-mlx-2bit", "0.5 GB"),
    "bonsai-4b": ("prism-ml/Ternary-Bonsai-4B-mlx-2bit", "1.1 GB"),
    "bonsai-8b": ("prism-ml/Ternary-Bonsai-8B-mlx-2bit", "2.2 GB"),
    "embedding-0.6b": ("microsoft/bitnet-embedding-0.6b", "0.4 GB"),
    "embedding-270m": ("microsoft/bitnet-embedding-270m", "0.4 GB"),
    "falcon-e-1b": ("tiiuae/Falcon-E-1B-Instruct", "0.6 GB"),
    "falcon-e-3b": ("tiiuae/Falcon-E-3B-Instruct", "1.0 GB"),
    "falcon3-1b": ("tiiuae/Falcon3-1B-Instruct-1.58bit", "1.4 GB"),
    "falcon3-3b": ("tiiuae/Falcon3-3B-Instruct-1.58bit", "2.2 GB"),
    "falcon3-7b": ("tiiuae/Falcon3-7B-Instruct-1.58bit", "3.3 GB"),
    "falcon3-10b": ("tiiuae/Falcon3-10B-Instruct-1.58bit", "4.0 GB"),
    "llama3-8b": ("HF1BitLLM/Llama3-8B-1.58-100B-tokens", "3.8 GB"),
}
DEFAULT_REVISION = "main"

# What the hub allows. Neither part can be, or lead to, another folder: no separators, no "..", no leading dot.
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}")  # a branch, a tag, refs/pr/1, a commit


class HubModel(NamedTuple):
    """A model of the hub: owner/name, and a branch, tag or commit. Made by `hub_model` or `from_folders` alone."""

    name: str
    revision: str

    def __str__(self) -> str:
        return self.name if self.revision == DEFAULT_REVISION else f"{self.name} ({self.revision})"

    @property
    def folders(self) -> tuple[str, str]:
        """The names of its folder and of the revision's folder in that."""
        return self.name.replace("/", "--"), quote(self.revision, safe="")


def looks_like_hub_id(name: str) -> bool:
    """Whether a name that is no local path is a hub id; not if it seems to be a file that is missing."""
    parts = name.split("/")
    return len(parts) == 2 and all(_is_part(part) for part in parts) and not name.endswith(".gguf")


def hub_model(name: str, revision: str | None = None) -> HubModel:
    """The model that a hub id or a short name means. Raises RequestError if it is neither."""
    name = KNOWN[name][0] if name in KNOWN else name
    parts = name.split("/")
    if len(parts) != 2 or not all(_is_part(part) for part in parts):
        raise RequestError(
            f"{printable(name)!r} is not the name of a model: give a hub id such as owner/name{did_you_mean(name)}"
        )
    if revision is None:
        revision = DEFAULT_REVISION
    if not isinstance(revision, str):
        raise RequestError(f"revision must be a string, not {shown(revision)}")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise RequestError(f"{shown(revision, 100)} is not a revision: give a branch, a tag or a commit")
    return HubModel(name, revision)


def from_folders(folder: str, revision: str) -> HubModel | None:
    """The model whose folders have these names; None if there is none."""
    try:
        model = hub_model(folder.replace("--", "/", 1), unquote(revision))
    except RequestError:
        return None
    return model if model.folders == (folder, revision) else None


def did_you_mean(name: str) -> str:
    """A hint at a short name that is nearly this one; empty if there is none."""
    advice = suggestion(name.lower(), KNOWN)
    return f"; {advice}" if advice else ""


def _is_part(part: str) -> bool:
    return _PART.fullmatch(part) is not None and ".." not in part and "--" not in part
