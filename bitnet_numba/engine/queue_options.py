"""How a scheduler treats a request beside the others: its turn, its deadlines, whose it is."""

from dataclasses import dataclass

from bitnet_numba.engine.request import as_integer
from bitnet_numba.errors import RequestError, shown
from bitnet_numba.sampling_params import as_float

MAX_SECONDS = 1e9


@dataclass(frozen=True)
class QueueOptions:
    """How a request waits and runs. Raises RequestError, naming the value, if one is invalid.

    priority: those with a lower number are started first, and are the last to lose their pages; in order of arrival
    where it is the same.
    tenant: on whose behalf it runs, see `max_per_tenant` of `Scheduler`.
    cache_salt: requests share computed pages with those of the same salt only.
    queue_timeout: seconds after which it ends with QueueTimeout unless it has been started; None for no limit.
    timeout: seconds, from when it was added, after which its answer ends as it is, with the reason "timeout"; None for
    no limit.
    """

    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    queue_timeout: float | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        priority = as_integer(self.priority)
        if priority is None:
            raise RequestError(f"priority must be an integer, not {shown(self.priority)}")
        object.__setattr__(self, "priority", priority)
        for name in ("tenant", "cache_salt"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise RequestError(f"{name} must be a string, not {shown(value)}")
        for name in ("queue_timeout", "timeout"):
            value = getattr(self, name)
            if value is None:
                continue
            seconds = as_float(value)
            if seconds is None or not 0 <= seconds <= MAX_SECONDS:
                raise RequestError(f"{name} must be a number of seconds up to {MAX_SECONDS:g}, not {shown(value)}")
            object.__setattr__(self, name, seconds)


USUAL = QueueOptions()
