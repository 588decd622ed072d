"""Log probabilities as arrays: a backend leaves those of a whole step, and objects are made of what is read.

A step of 128 sequences with 5 likely tokens each would be 900 objects, most of which nobody looks at.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.sampling import TokenLogprob

NONE = -1  # in place of how many of the most likely tokens a token comes with: nobody asks for any of it
HEAD = 2  # words before the ids: the token, and how many of the most likely ones it comes with


class LogprobRows(Sequence[TokenLogprob | None]):
    """Of several tokens; None where nobody asks for it.

    A row is 32-bit words: the token, `top`, the ids of the `top` most likely tokens, the token's log probability and
    theirs, each padded to the `most` that a row may have. As bytes, rows are cut out and joined faster than arrays are.
    """

    def __init__(self, data: bytes, most: int):
        """data: the rows."""
        self.data, self.most = data, most
        self.row_bytes = 4 * (HEAD + most + 1 + most)

    @staticmethod
    def pack(
        tokens: Sequence[int], tops: Sequence[int], ids: NDArray[np.int32], values: NDArray[np.float32]
    ) -> "LogprobRows":
        """Of tokens [n]. tops [n]: how many of the most likely tokens each comes with, or NONE. ids int32 [n, most or
        more]: these. values float32 [n, 1 + most or more]: the token's log probability, and theirs."""
        most = max(0, *tops, 0)
        words = np.empty((len(tokens), HEAD + most + 1 + most), np.int32)
        words[:, 0], words[:, 1] = tokens, tops
        words[:, HEAD : HEAD + most] = ids[:, :most]
        words[:, HEAD + most :] = values[:, : 1 + most].view(np.int32)
        return LogprobRows(words.tobytes(), most)

    def __len__(self) -> int:
        return len(self.data) // self.row_bytes

    @overload
    def __getitem__(self, index: int) -> TokenLogprob | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprob | None]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self.row_bytes
        words = np.frombuffer(self.data, np.int32, self.row_bytes // 4, start)
        token, top = words[:HEAD].tolist()
        if top == NONE:
            return None
        ids = words[HEAD : HEAD + top].tolist()
        logprob, *values = words[HEAD + self.most :][: 1 + top].view(np.float32).tolist()
        return TokenLogprob(token, logprob, list(zip(ids, values, strict=True)))


class LogprobList(Sequence[TokenLogprob]):
    """The log probabilities of an answer's tokens: rows of `LogprobRows` or of lists, read when they are asked for."""

    def __init__(self, sources: Iterable[Sequence[TokenLogprob | None]] = (), rows: Iterable[int] = ()):
        """sources [n], rows [n]: what holds the log probability of each token, and its place there."""
        self._sources, self._rows = list(sources), list(rows)
        self._num_own = 0  # so many of the first tokens have sources that hold nothing of other answers

    def append(self, source: Sequence[TokenLogprob | None], row: int) -> None:
        """Adds the log probability of another token."""
        self._sources.append(source)
        self._rows.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenLogprob: ...

    @overload
    def __getitem__(self, index: slice) -> "LogprobList": ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return LogprobList(self._sources[index], self._rows[index])
        return self._sources[index][self._rows[index]]

    def __iter__(self) -> Iterator[TokenLogprob]:
        for source, row in zip(self._sources, self._rows, strict=True):
            found = source[row]
            assert found is not None
            yield found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def keep_own(self) -> None:
        """Copies its own rows out of the sources, so that these no longer keep other answers' rows in memory."""
        sources: list[Any] = self._sources[self._num_own :]
        rows = self._rows[self._num_own :]
        if not sources:
            return
        widths = {getattr(source, "row_bytes", None) for source in sources}
        (width,) = widths if len(widths) == 1 else (None,)
        own: Sequence[TokenLogprob | None]
        if width is None:  # they are objects already, or others of a step have asked for more
            own = [source[row] for source, row in zip(sources, rows, strict=True)]
        else:
            cut = [source.data[row * width : (row + 1) * width] for source, row in zip(sources, rows, strict=True)]
            own = LogprobRows(b"".join(cut), sources[0].most)
        self._sources[self._num_own :] = [own] * len(rows)
        self._rows[self._num_own :] = range(len(rows))
        self._num_own = len(self._rows)


class ReadWhenAsked:
    """A field of a dataclass that is a list, made of the sequence it was set to when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> None: ...

    @overload
    def __get__(self, instance: object, owner: type) -> list[TokenLogprob] | None: ...

    def __get__(self, instance: object | None, owner: type) -> list[TokenLogprob] | None:
        if instance is None:  # the field's default
            return None
        value = instance.__dict__[self._name]
        if value is not None and not isinstance(value, list):
            value = instance.__dict__[self._name] = list(value)
        return value

    def __set__(self, instance: object, value: Sequence[TokenLogprob] | None) -> None:
        instance.__dict__[self._name] = value
