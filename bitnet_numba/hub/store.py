"""The cache folder of converted models.

owner--name/revision/model/         a packed checkpoint
owner--name/revision/origin.json    its commit, and what the conversion noted; touched at each use
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_numba.checkpoint.install import delete
from bitnet_numba.checkpoint.packed import FORMATS, read_config
from bitnet_numba.errors import BitNetError, CheckpointError, printable
from bitnet_numba.hub.names import HubModel, from_folders
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import ModelFolder, why


@dataclass(frozen=True)
class StoredModel:
    """What the cache folder holds of a model."""

    model: HubModel
    path: Path  # of the packed checkpoint
    nbytes: int  # on the disk, with what killed conversions have left
    last_used: float | None  # seconds since 1970; None: unknown
    commit: str | None
    notes: tuple[str, ...]  # of the conversion, such as keys that were ignored
    complete: bool  # False: only remains of a conversion that was killed


def cache_folder() -> Path:
    """Where models are kept: $BITNET_NUMBA_MODELS, or bitnet-numba/models in the user's cache folder.

    Raises CheckpointError if the user has no home."""
    chosen = os.environ.get("BITNET_NUMBA_MODELS")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-numba" / "models"
    except RuntimeError:
        raise CheckpointError("there is no home folder to keep models in: set BITNET_NUMBA_MODELS") from None


def packed_folder(model: HubModel) -> Path:
    """Where the packed checkpoint of a model is, or would be."""
    return cache_folder().joinpath(*model.folders, "model")


def is_usable(model: HubModel) -> bool:
    """Whether the cache holds a model, in a packed format that this version reads."""
    try:
        packed = read_config(ModelFolder(packed_folder(model))).get("bitnet_numba")
    except BitNetError:
        return False
    return isinstance(packed, dict) and packed.get("format") in FORMATS


def record(model: HubModel, commit: str, notes: Sequence[str] = ()) -> None:
    """Writes down the commit that a model was made from; without that file, only the information is missing."""
    path = _origin(model)
    with contextlib.suppress(OSError):
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".origin-")
        try:
            with open(descriptor, "w") as file:
                json.dump({"commit": commit, "notes": list(notes)}, file)
            os.replace(unfinished, path)
        except BaseException:  # a full disk, or Ctrl-C
            os.unlink(unfinished)
            raise


def touch(model: HubModel) -> None:
    """Notes that a model is used now, if the cache can be written."""
    with contextlib.suppress(OSError):
        os.utime(_origin(model))


def stored_models() -> list[StoredModel]:
    """All models in the cache folder, by name. Raises CheckpointError if it cannot be read."""
    found = []
    for folder in _folders(cache_folder()):
        for revision in _folders(folder):
            model = from_folders(folder.name, revision.name)
            if model is not None and not _is_empty(revision):  # as where a model was refused
                found.append(_stored(model))
    return found


def find(name: HubModel, any_revision: bool = False) -> list[StoredModel]:
    """What the cache folder holds of a model, or of all its revisions. Raises CheckpointError if that is nothing."""
    of_name = [stored for stored in stored_models() if stored.model.name == name.name]
    found = [stored for stored in of_name if any_revision or stored.model == name]
    if not found:
        where = printable(str(cache_folder()), 400)
        if of_name:
            others = ", ".join(stored.model.revision for stored in of_name)
            raise CheckpointError(f"{name.name} is in {where} with --revision {others}, not with {name.revision}")
        raise CheckpointError(f"{name} is not in {where}")
    return found


def remove(stored: StoredModel) -> None:
    """Deletes a model. Raises CheckpointError if it is being written right now, or cannot be deleted."""
    folder = stored.path.parent
    try:
        delete(stored.path)
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # other revisions
            folder.parent.rmdir()
    except OSError as error:
        raise CheckpointError(f"{printable(str(folder), 400)} cannot be deleted: {why(error)}") from None


def size_on_disk(folder: Path, seconds: float = math.inf) -> int | None:
    """Bytes of all files in a folder; links are not followed, what cannot be read is left out.

    None if that takes longer than so many seconds.
    """
    total, end = 0, time.monotonic() + seconds
    for path, _, names in os.walk(folder):
        if time.monotonic() > end:
            return None
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _stored(model: HubModel) -> StoredModel:
    path, origin = packed_folder(model), _origin(model)
    last_used, commit, notes = None, None, None
    with contextlib.suppress(OSError, BitNetError):
        last_used = origin.stat().st_mtime
        noted = read_json(ModelFolder(origin.parent) / origin.name)
        commit, notes = noted.get("commit"), noted.get("notes")
    if last_used is None:
        with contextlib.suppress(OSError):
            last_used = path.stat().st_mtime
    commit = printable(commit, 64) if isinstance(commit, str) else None
    notes = tuple(printable(note, 400) for note in notes if isinstance(note, str)) if isinstance(notes, list) else ()
    return StoredModel(model, path, size_on_disk(path.parent) or 0, last_used, commit, notes, path.is_dir())


def _origin(model: HubModel) -> Path:
    return packed_folder(model).parent / "origin.json"


def _is_empty(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return not os.listdir(folder)
    return False  # what cannot be read may hold something


def _folders(folder: Path) -> Iterator[Path]:
    """The folders in a folder, sorted; none if there is no such folder."""
    try:
        yield from sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{printable(str(folder), 400)} cannot be read: {why(error)}") from None
