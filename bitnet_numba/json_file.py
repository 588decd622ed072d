"""Reading the JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any

from bitnet_numba.errors import BitNetError, CheckpointError, one_line


def read_json(path: Path, error_type: type[BitNetError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file. Raises `error_type`, naming the file, for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{path} is not readable JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object")
    return value
