"""Reading the JSON files of a model folder."""

import json
import os
from typing import Any

from bitnet_numba.errors import BitNetError, CheckpointError, one_line
from bitnet_numba.model_folder import FileError, ModelFile


def read_json(
    path: str | os.PathLike[str] | ModelFile, error_type: type[BitNetError] = CheckpointError
) -> dict[str, Any]:
    """The JSON object in a file. Raises `error_type`, naming the file, for anything else."""
    file = ModelFile.of(path)
    try:
        value = json.loads(file.read_bytes())
    except FileError as error:
        raise error_type(f"{file} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise error_type(f"{file} is not readable JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise error_type(f"{file} must hold a JSON object")
    return value
