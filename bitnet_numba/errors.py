"""Errors that a user can cause. Each message is one clear line, which command lines print before exiting with 2."""


class BitNetError(Exception):
    """Base class of all errors that this package raises for invalid input."""


class ConfigError(BitNetError):
    """A model's config.json is damaged or needs something that is not supported."""


class CheckpointError(BitNetError):
    """A checkpoint folder, file or tensor is missing, damaged or does not match the configuration."""


class TokenizerError(BitNetError):
    """A tokenizer or chat template is missing, damaged or does not match the model."""


class RequestError(BitNetError):
    """A prompt or an option is invalid."""


class ContextFull(RequestError):
    """The prompt does not fit into the context."""


class BackendError(BitNetError):
    """The requested backend cannot run on this machine."""


def one_line(error: BaseException) -> str:
    """Another library's message, shortened to one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
