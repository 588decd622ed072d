"""Downloads from the Hugging Face hub, into the cache that huggingface_hub shares with other programs."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from bitnet_numba.errors import CheckpointError, one_line, printable
from bitnet_numba.hub.names import HubModel

# What is needed of a repository. In a pattern, * stands for folders, too; weights are those of the top folder.
NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
NOT_NEEDED = ["*/*.safetensors"]

_log = logging.getLogger("bitnet_numba")


def download(model: HubModel) -> Path:
    """The Hugging Face folder of a model: downloaded, with progress on a terminal, or from the cache if the hub cannot
    be asked, which is logged. Its name is the commit. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    reason = why_not_reachable(model)
    try:
        with _bars_on_terminals_only():
            folder = snapshot_download(
                model.name,
                revision=model.revision,
                allow_patterns=NEEDED_FILES,
                ignore_patterns=NOT_NEEDED,
                local_files_only=reason is not None,
            )
    except Exception as error:  # the library's errors (network, disk, authorisation) have no common base
        raise CheckpointError(
            f"{printable(str(model))} is not a local folder and could not be downloaded: {reason or one_line(error)}"
        ) from None
    if reason is not None:
        _log.warning("%s is taken from the Hugging Face cache as it is: %s", printable(str(model)), reason)
    return Path(folder)


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
