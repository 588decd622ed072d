"""Errors that a user can cause. Each carries one clear line; command lines print it and exit with code 2."""


class BitNetError(Exception):
    """Base of every error this package raises for bad input. The message is one line, meant for the user."""


class ConfigError(BitNetError):
    """A model's config.json is damaged or asks for something that is not supported."""


class CheckpointError(BitNetError):
    """A checkpoint folder, file or tensor is missing, damaged or does not fit the configuration."""


class TokenizerError(BitNetError):
    """A tokenizer or chat template is missing, damaged or does not fit the model."""


class RequestError(BitNetError):
    """A prompt or a sampling value cannot be used."""


class ContextFull(RequestError):
    """The prompt does not fit the model's context."""


class BackendError(BitNetError):
    """The requested backend cannot run here."""


def one_line(error: BaseException) -> str:
    """Another library's message, shortened to one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
