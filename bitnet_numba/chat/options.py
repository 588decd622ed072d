"""How answers are generated, as options of the command line and as settings of /set."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bitnet_numba.errors import RequestError, printable
from bitnet_numba.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.6, top_p=0.9)  # for models without a generation_config.json


@dataclass(frozen=True)
class SamplingOption:
    """An option of one value: `--NAME METAVAR` and `/set NAME VALUE`."""

    name: str
    metavar: str
    kind: Callable[[str], float]
    meaning: str
    none: str = ""  # the word of /set for None, where that is a value

    @property
    def field(self) -> str:
        """The field of SamplingParams."""
        return self.name.replace("-", "_")


OPTIONS = (
    SamplingOption("temperature", "T", float, "how freely words are chosen: 0 always takes the most likely one"),
    SamplingOption("top-p", "P", float, "sample from the smallest set of tokens with total probability P"),
    SamplingOption("top-k", "K", int, "sample from the K most likely tokens; 0: from all"),
    SamplingOption("min-p", "P", float, "drop tokens less likely than P times the most likely one"),
    SamplingOption(
        "repetition-penalty", "R", float, "values above 1 make tokens that have already occurred less likely"
    ),
    SamplingOption("presence-penalty", "P", float, "above 0: tokens that the answer has already are less likely"),
    SamplingOption("frequency-penalty", "P", float, "the same, for each time that the answer has them"),
    SamplingOption("seed", "N", int, "the same seed gives the same answers", "random"),
    SamplingOption("max-new-tokens", "N", int, "maximum tokens per answer", "none"),
)
STOP = "end the answer before this text"
THINKING = "whether the model thinks before it answers, for models that can do both"
THINKING_VALUES = {"on": True, "off": False, "default": None}  # None: as the model does where it is not told
ALIASES = {"length": "max-new-tokens"}  # of /set


def changed(params: SamplingParams, name: str, text: str, first: SamplingParams) -> SamplingParams:
    """The parameters with a setting's value as a user typed it: a number's "default" is that of `first`.

    Raises RequestError if it is no value of the setting.
    """
    if name == "stop":
        return replace(params, stop=() if text.lower() == "none" else (*params.stop, text))  # type: ignore[misc]
    if name == "thinking":
        if text.lower() not in THINKING_VALUES:
            raise RequestError(f"thinking must be on, off or default, not {printable(text, 40)}")
        return replace(params, thinking=THINKING_VALUES[text.lower()])
    option = _option(name)
    if text.lower() == "default":
        return _with(params, option.field, getattr(first, option.field))
    if option.none and text.lower() == option.none:
        return _with(params, option.field, None)
    try:
        value = option.kind(text)
    except ValueError:
        words = f"{'a whole' if option.kind is int else 'a'} number"
        words += f", {option.none} or default" if option.none else " or default"
        raise RequestError(f"{option.name} must be {words}, not {printable(text, 40)}") from None
    return _with(params, option.field, value)


def _with(params: SamplingParams, field: str, value: Any) -> SamplingParams:
    return replace(params, **{field: value})


def value_text(params: SamplingParams, name: str) -> str:
    """A setting's value in words."""
    if name == "stop":
        return ", ".join(repr(text) for text in params.stop or ()) or "none"
    if name == "thinking":
        return next(word for word, value in THINKING_VALUES.items() if value is params.thinking)
    option = _option(name)
    value = getattr(params, option.field)
    return option.none if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _option(name: str) -> SamplingOption:
    return next(option for option in OPTIONS if option.name == ALIASES.get(name, name))
