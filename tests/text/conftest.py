"""The recorded tokenizer, and copies of it that a test may change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitnet_numba.text.tokenizer import Tokenizer
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "tokenizer"
TOKENIZER = Tokenizer.open(FOLDER)
BOS, EOS, EOT = 1990, 1991, 1999
HI = [{"role": "user", "content": "Hi."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden tokenizer that a test may change."""
    return Path(shutil.copytree(FOLDER, tmp_path / "model"))


def set_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))
    return folder
