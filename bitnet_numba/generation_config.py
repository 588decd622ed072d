"""The sampling that a model's generation_config.json asks for."""

import logging
from pathlib import Path
from typing import Any

from bitnet_numba.checkpoint.packed import read_json
from bitnet_numba.errors import RequestError
from bitnet_numba.sampling import SamplingParams

KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_log = logging.getLogger("bitnet_numba")


def read_sampling(folder: Path) -> SamplingParams | None:
    """How the model's makers sample from it; None where the file is missing or says nothing about it.

    Keys are those of Hugging Face: do_sample false is greedy whatever temperature says. A key that is not there does
    nothing, top_k included. A value that cannot be is left out, with one line in the log. Raises CheckpointError for
    a file that is not a JSON object.
    """
    path = folder / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    # As there, a model that samples and says no more does so at temperature 1.
    values: dict[str, Any] = {"temperature": 1.0} if config.get("do_sample") is True else {}
    for key in KEYS:
        value = config.get(key)
        if value is None:
            continue
        try:
            SamplingParams(**{key: value})
        except RequestError as error:
            _log.warning("%s: %s; left out", path, error)
            continue
        values[key] = value
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    elif values:
        values.setdefault("temperature", 1.0)
    return SamplingParams(**values) if values else None
