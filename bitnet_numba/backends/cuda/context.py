"""One sequence on the GPU, behind the engine's interface (see `backends.protocol.Context`)."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.cuda.extras import NOTHING, Asked, Extras, PromptScorer, Records, asked_by
from bitnet_numba.backends.cuda.forward import MAX_TOKENS
from bitnet_numba.backends.cuda.lm_head import LMHead
from bitnet_numba.backends.cuda.prompts import Prefill, PromptPart
from bitnet_numba.backends.cuda.runtime import Runtime
from bitnet_numba.backends.cuda.state import SequenceState, pages_of, why_nan
from bitnet_numba.backends.cuda.steps import DecodeSteps
from bitnet_numba.backends.protocol import Constraint
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.decode import LONG_CONTEXT
from bitnet_numba.kernels.runtime.driver import Event, Graph, Pace
from bitnet_numba.kernels.runtime.memory import PinnedArray
from bitnet_numba.kernels.sampling.parts import pack_settings
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams

RING_SIZE = 64  # sampled tokens that the host may be behind
STEPS_AHEAD = 2  # steps in flight while the host deals with a token
MAX_SCORED = 128  # tokens whose logits are computed at a time


class CudaContext:
    """One sequence. Its steps and passes over prompts are captured when first needed, and replayed."""

    def __init__(self, runtime: Runtime, capacity: int, on_close: Callable[[int], None]):
        """on_close: called on close with the number of pages freed."""
        self.capacity = capacity
        self.ids: list[int] = []
        self._runtime, self._on_close = runtime, on_close
        model = runtime.model
        self._state = SequenceState(runtime.device, model.config, capacity, kv_dtype=model.kv_dtype)
        self._ring = PinnedArray(RING_SIZE, np.int64)
        self._steps = DecodeSteps(runtime.model, runtime.decode_buffers, self._state, self._ring)
        self._prefill = Prefill(runtime, self._state)
        self._graphs: dict[tuple[str, bool, Asked], Graph] = {}
        self._records: Records | None = None  # of tokens, by position; see `extras`
        self._last: tuple[int, int, int] | None = None  # position and token yielded last, and most likely ones wanted
        self._pace = Pace()
        self._events = [Event(timing=False) for _ in range(STEPS_AHEAD + 1)]  # ends of steps under way, by position

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot truncate a context of {len(self.ids)} tokens to {length}")
        self._runtime.device.activate()
        if length < len(self.ids):
            del self.ids[length:]
            # Bits of the tokens that stay: a token that was cut may have been there before as well.
            self._state.seen.write(self._state.seen_bits(self.ids))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [T, vocab]."""
        self._start(ids)
        runtime = self._runtime
        result = np.empty((len(ids), runtime.model.config.vocab_size), np.float32)
        if len(ids) == 1:
            self._replay("score", len(self.ids))
            runtime.stream.synchronize()
            runtime.decode_buffers.logits.read_into(result)
        else:
            lm_head = LMHead(runtime.model, min(len(ids), MAX_SCORED))
            for start in range(0, len(ids), MAX_SCORED):
                part = result[start : start + MAX_SCORED]
                for _ in self._prefill.feed([PromptPart(0, len(self.ids) + start, len(part))]):
                    pass  # one pass
                for launch in lm_head.launches(len(part), runtime.model.buffers.h):
                    launch(runtime.stream.handle)
                runtime.stream.synchronize()
                lm_head.logits.read_into(part)
            lm_head.close()
        self.ids += ids
        return result

    def decode(self, ids: Sequence[int], params: SamplingParams, constraint: Constraint | None = None) -> Iterator[int]:
        """Appends tokens (at least one), then yields sampled tokens, one a step, until the context is full."""
        self._start(ids)
        self._state.settings.write(pack_settings(params))
        masked = constraint is not None
        asked = asked_by([params], masked)
        if any(asked):
            write, length = self._runtime.uploads.write, len(self.ids) + len(ids)
            self._open_extras().set_slot(write, 0, params, length, masked)
        top = min(params.logprobs or 0, self._runtime.model.config.vocab_size)
        if len(ids) == 1 and constraint is None:
            self._replay("decode", len(self.ids), asked)
        elif len(ids) == 1:
            self._replay("feed", len(self.ids))
            self._draw(len(self.ids), asked, constraint)
        else:
            write, last = self._runtime.uploads.write, len(self.ids) + len(ids) - 1
            for ends in self._prefill.feed([PromptPart(0, len(self.ids), len(ids))]):
                for _, row in ends:
                    write(self._runtime.decode_buffers.last_row, [row])
            write(self._state.position, [last])
            self._upload_mask(constraint)
            self._replay("choose", last, asked)
        self.ids += ids
        known = launched = len(self.ids)  # tokens fed for certain; positions whose step is under way or done
        try:
            while True:
                if constraint is not None and known < self.capacity:
                    self._replay("feed", known)
                # The steps after this one are queued before its token is read: the device never waits for the host.
                while constraint is None and launched < min(self.capacity, known + STEPS_AHEAD):
                    self._replay("decode", launched, asked)
                    launched += 1
                token = self._token(known)
                if constraint is not None:
                    constraint.accept(token)
                    if known < self.capacity:
                        self._draw(known, asked, constraint)
                        launched += 1
                self._last = known, token, top
                yield token
                if known == self.capacity:
                    return
                self.ids.append(token)
                known += 1
        finally:
            self._runtime.device.activate()
            self._runtime.stream.synchronize()
            # What was fed ahead stays in the cache until it is cut or overwritten.
            for position in range(known, launched):
                self.ids.append(self._token(position))

    def logprobs(self) -> TokenLogprob:
        """Of the token that `decode` has yielded last."""
        assert self._records is not None and self._last is not None
        position, token, top = self._last
        (found,) = self._records.read(position % RING_SIZE, [token], [top])
        assert found is not None
        return found

    def score(self, ids: Sequence[int], top: int, first: int = 1) -> list[TokenLogprob]:
        """Appends all tokens but the last, and returns log probabilities of ids[first:]."""
        fed = ids[:-1]
        self._start(fed)
        self._state.tokens.write(np.asarray(ids[-1:], np.int32), len(self.ids) + len(fed))
        runtime, result, start = self._runtime, list[TokenLogprob](), 0
        scorer = PromptScorer(runtime.model, self._state)
        try:
            for _ in self._prefill.feed([PromptPart(0, len(self.ids), len(fed))]):
                count = min(len(fed) - start, MAX_TOKENS)
                skipped = min(max(0, first - 1 - start), count)
                tokens = ids[start + skipped + 1 : start + count + 1]
                result += scorer.score(runtime.stream, runtime.uploads.write, 0, skipped, tokens, top)
                start += count
        finally:
            runtime.stream.synchronize()
            scorer.close()
        self.ids += fed
        return result

    def _draw(self, position: int, asked: Asked, constraint: Constraint | None) -> None:
        """Enqueues the second part of a step, after its mask. Raises RequestError if the form cannot be followed."""
        self._upload_mask(constraint)
        self._replay("draw", position, asked)

    def _upload_mask(self, constraint: Constraint | None) -> None:
        if constraint is not None:
            for error in self._open_extras().masks.upload(self._runtime.stream, [constraint]).values():
                raise error

    def _open_extras(self) -> Extras:
        if self._steps.extras is None:
            self._records = Records(RING_SIZE)
            self._steps.extras = Extras(self._runtime.model, self._state, 1, self._records)
        return self._steps.extras

    def close(self) -> None:
        """Frees the cache and the captured steps."""
        self._runtime.device.activate()
        self._runtime.stream.synchronize()
        for graph in self._graphs.values():
            graph.close()
        self._prefill.close()
        self._state.close()
        self._ring.close()
        for more in (self._steps.extras, self._records):
            if more is not None:
                more.close()
        self._on_close(pages_of(self.capacity))

    def _start(self, ids: Sequence[int]) -> None:
        """Stores tokens where the steps read them, and the position of the first."""
        if not 1 <= len(ids) <= self.capacity - len(self.ids):
            raise ValueError(f"{len(ids)} tokens do not fit {self.capacity - len(self.ids)} free places")
        self._runtime.device.activate()
        self._state.tokens.write(np.asarray(ids, np.int32), len(self.ids))
        self._ring.host[:] = -1  # an earlier answer's entries may be for the same positions
        self._state.position.write(np.array([len(self.ids)], np.int32))

    def _replay(self, kind: str, position: int, asked: Asked = NOTHING) -> None:
        """Enqueues the step of a kind (a method of DecodeSteps) whose last token fed is at a position."""
        key = kind, position >= LONG_CONTEXT, asked
        if key not in self._graphs:
            launches = getattr(self._steps, kind)
            self._graphs[key] = self._runtime.stream.capture(
                launches(key[1], asked) if any(asked) else launches(key[1])
            )
        self._graphs[key].replay(self._runtime.stream)
        self._events[(position + 1) % len(self._events)].record(self._runtime.stream)

    def _token(self, position: int) -> int:
        """The token chosen for a position, once the device has written it to the ring."""
        self._pace.wait(self._events[position % len(self._events)])
        entry = int(self._ring.host[position % RING_SIZE])
        if entry >> 32 != position:
            raise BackendError("a decode step ended without a token")
        token = entry & 0xFFFFFFFF
        if token >> 31:
            raise ValueError(why_nan(self._state.kv_dtype))
        return token
