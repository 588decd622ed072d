"""The folder that a name means: a local one, or a model of the hub or a GGUF file, converted when it is first used."""

import hashlib
import logging
import os
import re
import sys
from pathlib import Path

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.install import BeingWritten, CannotWrite, is_there, wait_for_writer
from bitnet_numba.checkpoint.progress import progress_bar
from bitnet_numba.errors import CheckpointError, RequestError, printable
from bitnet_numba.hub import store
from bitnet_numba.hub.download import download, downloaded
from bitnet_numba.hub.names import KNOWN, HubModel, did_you_mean, hub_model, looks_like_hub_id
from bitnet_numba.model_folder import why

_log = logging.getLogger("bitnet_numba")


def find_model(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The packed folder that a user names; a string may be a hub id or a short name, for which `fetch` is called, and
    owner/name/FILE.gguf.

    An existing local folder or GGUF file of that name comes first, and a pathlib.Path is always local. The folder need
    not exist. Raises RequestError for a revision of something local, and what `fetch` raises.
    """
    if is_gguf(name):
        file = downloaded_gguf(name, revision)
        if file is None or not store.is_usable(gguf_model(file)):
            file = find_gguf(name, revision)
        return fetch_gguf(file)
    model = as_hub_model(name, revision)
    if model is not None:
        return fetch(model)
    if revision is not None:
        raise RequestError("a revision needs a hub id, not a folder")
    if isinstance(name, str) and os.sep not in name and not is_there(name) and did_you_mean(name):
        raise CheckpointError(f"{printable(name)} does not exist{did_you_mean(name)}")
    if os.path.isfile(name):
        raise CheckpointError(f"{printable(str(name), 400)} is neither a folder nor a GGUF file, which ends in .gguf")
    return Path(name)


def as_hub_model(name: str | os.PathLike[str], revision: str | None = None) -> HubModel | None:
    """The model of the hub that a user names; None if the name is that of a local folder."""
    if not isinstance(name, str) or not (name in KNOWN or looks_like_hub_id(name)) or is_there(name):
        return None
    return hub_model(name, revision)


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a GGUF file, here or on the hub."""
    path = os.fspath(name)
    return isinstance(path, str) and path.lower().endswith(".gguf") and not os.path.isdir(path)


def find_gguf(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The GGUF file at a path, or owner/name/FILE.gguf downloaded from the hub. Raises BitNetError."""
    on_hub = _gguf_of_hub(name, revision)
    if on_hub is not None:
        return download(*on_hub)
    if revision is not None:
        raise RequestError("a revision needs a hub id, not a file")
    return Path(name)


def downloaded_gguf(name: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """The file of owner/name/FILE.gguf in the Hugging Face cache, without asking the hub; None if it is not there, or
    if the name is that of a file here."""
    on_hub = _gguf_of_hub(name, revision)
    return None if on_hub is None else downloaded(*on_hub)


def _gguf_of_hub(name: str | os.PathLike[str], revision: str | None) -> tuple[HubModel, str] | None:
    """Repository and file of owner/name/FILE.gguf; None if the name is that of a file here."""
    if isinstance(name, str) and not is_there(name):
        owner, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        if file and looks_like_hub_id(f"{owner}/{repository}"):
            return hub_model(f"{owner}/{repository}", revision), file
    return None


def gguf_model(file: Path) -> HubModel:
    """The name in the cache of a GGUF file as it is now. Raises CheckpointError if it cannot be looked at."""
    try:
        found = file.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{printable(str(file), 400)} cannot be opened: {why(error)}") from None
    identity = f"{os.path.realpath(file)}\0{found.st_size}\0{found.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_]+", "-", file.stem).strip("-")[:60].rstrip("-") or "model"
    return hub_model(f"gguf/{name}-{digest}")


def fetch_gguf(file: Path) -> Path:
    """The packed folder of a GGUF file, converted unless the cache holds it as it is now. Raises BitNetError."""
    model = gguf_model(file)
    target = store.packed_folder(model)
    if not store.is_usable(model):
        _convert_once(model, file, target, str(file))
    store.touch(model)
    return target


def fetch(model: HubModel) -> Path:
    """The packed folder of a model of the hub, which is downloaded and converted unless the cache holds it.

    What the cache holds is used without asking the hub. Several processes may do this at once: one converts, the others
    wait. Raises BitNetError.
    """
    target = store.packed_folder(model)
    if not store.is_usable(model):
        source = download(model)
        _convert_once(model, source, target, str(model))
    store.touch(model)
    return target


def _convert_once(model: HubModel, source: Path, target: Path, name: str) -> None:
    while not store.is_usable(model):
        try:
            with progress_bar(printable(name, 400), sys.stderr) as show:
                # What is there has another format.
                report = convert(source, target, force=is_there(target), progress=show)
        except BeingWritten:
            _log.warning("another process is converting %s; waiting for it", printable(name, 400))
            wait_for_writer(target)
        except CannotWrite as error:
            raise CheckpointError(f"{error}; set BITNET_NUMBA_MODELS to keep models in another folder") from None
        except CheckpointError:
            if not store.is_usable(model):  # else another process was faster
                raise
        else:
            store.record(model, source.name, report.notes)
