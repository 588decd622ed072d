"""A Griffe extension: the documentation site shows docstrings and comments by `tools.docs.markdown`."""

import functools
from pathlib import Path
from typing import Any

import griffe

from tools.docs.markdown import as_markdown, comment_of


class Docstrings(griffe.Extension):
    """Griffe calls these methods for each object that it has read from source."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _list_names(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _list_names(cls, set(cls.attributes))

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if "class-attribute" not in attr.labels and "instance-attribute" in attr.labels:
            attr.value = None  # self.x = x says nothing
        if attr.docstring is None and attr.lineno and isinstance(attr.filepath, Path):
            comment = comment_of(_lines(attr.filepath), attr.lineno, attr.endlineno or attr.lineno)
            if comment:
                attr.docstring = griffe.Docstring(comment, parent=attr)


def _list_names(item: griffe.Function | griffe.Class, names: set[str]) -> None:
    if item.docstring is not None:
        item.docstring.value = as_markdown(item.docstring.value, names)


@functools.cache
def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines())
