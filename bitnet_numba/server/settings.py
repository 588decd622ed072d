"""What an operator can choose; `command_line.py` has an option for each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and manners of one server. Times in seconds, sizes in bytes."""

    models: tuple[str, ...] = ("default",)  # the model's id, and further names that requests may use
    api_keys: tuple[str, ...] = ()  # none: anybody may ask
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header; none: any
    cors_origins: tuple[str, ...] = ()  # of pages that may ask; ("*",): of any page
    max_sequences: int = 64  # answers that run together
    tokens: int | None = None  # of the KV cache; None: as the backend chooses
    prefill_chunk: int | None = None  # prompt tokens computed in one step; None: see `engine.prompt_budget`
    max_waiting: int = 256  # answers that wait for their turn; more are refused with 429
    max_per_key: int | None = None  # answers of one key that run together; the others wait
    queue_timeout: float = 60.0  # an answer that has not been started by then is given up
    max_choices: int = 128  # prompts x n of one request
    answer_timeout: float = 600.0  # from a request's arrival to its answer's end
    hang_timeout: float = 180.0  # a step that takes longer is a failure; the first ones may compile kernels
    drain_timeout: float = 30.0  # from SIGTERM to the end of what is under way
    receive_timeout: float = 30.0  # for a request's header, and again for its body
    max_body: int = 4 << 20
    max_header: int = 64 << 10
    max_connections: int = 4096
    coalesce: float = 0.04  # text of one stream is collected for so long and sent as one event
    log_requests: bool = False  # a line for each request, without its content

    @property
    def most_choices(self) -> int:
        """What `max_choices` comes to: more answers than may run and wait are never admitted."""
        return min(self.max_choices, self.max_sequences + self.max_waiting)
