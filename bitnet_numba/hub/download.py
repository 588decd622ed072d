"""Downloads from the Hugging Face hub, into the cache that huggingface_hub shares with other programs."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bitnet_numba.errors import CheckpointError, one_line, printable
from bitnet_numba.hub.names import HubModel

# What is needed of a repository. In a pattern, * stands for folders, too; weights are those of the top folder.
NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
NOT_NEEDED = ["*/*.safetensors"]
PART = re.compile(r"-\d{5}(-of-\d{5}\.gguf)$")  # of a GGUF file that is one of several

_log = logging.getLogger("bitnet_numba")


def download(model: HubModel, file: str | None = None) -> Path:
    """The Hugging Face folder of a model, or a GGUF file in it: downloaded, with progress on a terminal, or from the
    cache if the hub cannot be asked, which is logged. The folder's name is the commit. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    reason = why_not_reachable(model)
    try:
        with _bars_on_terminals_only():
            folder = snapshot_download(
                model.name,
                revision=model.revision,
                allow_patterns=NEEDED_FILES if file is None else [PART.sub(r"-*\1", file)],
                ignore_patterns=NOT_NEEDED if file is None else None,
                local_files_only=reason is not None,
            )
    except Exception as error:  # the library's errors (network, disk, authorisation) have no common base
        raise CheckpointError(
            f"{printable(str(model))} is not a local folder and could not be downloaded: {reason or one_line(error)}"
        ) from None
    if reason is not None:
        _log.warning("%s is taken from the Hugging Face cache as it is: %s", printable(str(model)), reason)
    if file is None and not (Path(folder) / "config.json").exists():
        name = printable(model.name)
        raise CheckpointError(f"{name} has no config.json; for a GGUF file in it, name {name}/FILE.gguf")
    if file is not None and not (Path(folder) / file).exists():
        raise CheckpointError(f"{printable(str(model))} has no file {printable(file)}")
    return Path(folder) if file is None else Path(folder) / file


def downloaded(model: HubModel, file: str) -> Path | None:
    """A file of a model that the Hugging Face cache holds, without asking the hub; None if it does not."""
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model.name, file, constants.HF_HUB_CACHE, model.revision)
    except (OSError, ValueError):  # a name that no file has
        return None
    return Path(found) if isinstance(found, str) else None


def why_not_reachable(model: HubModel) -> str | None:
    """Why the hub does not offer a model now, in a few words; None if it does."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE is set)"
    try:
        HfApi().model_info(model.name, revision=model.revision, timeout=10)
    except errors.GatedRepoError:
        return f"its terms must be accepted at https://huggingface.co/{model.name}, then log in with  hf auth login"
    except errors.RevisionNotFoundError:
        return f"there is no revision {printable(model.revision)}"
    except errors.RepositoryNotFoundError:
        return "the hub has no such model, or it is private (log in with  hf auth login)"
    except Exception as error:
        return f"the hub cannot be reached: {one_line(error)}"
    return None


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Inside, downloads show no progress where it would be hundreds of lines."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()  # for the whole process, which may have downloads of its own later
    try:
        yield
    finally:
        enable_progress_bars()
