"""What sampling needs on the device for requests that ask for more: edits of logits, and log probabilities.

A step in which a sequence asks for it has one launch more before the sampler, one after it, or both:

    logits ──> edit_logits ──> edited ──> sampler ──> token
       └──────────────────────────────────────────────> logprobs ──> records

Other steps have neither, and what is here is allocated by the first request that asks.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.cuda.forward import CudaModel
from bitnet_numba.backends.cuda.lm_head import LMHead
from bitnet_numba.backends.cuda.masks import Masks
from bitnet_numba.backends.cuda.state import SequenceState
from bitnet_numba.kernels.runtime.driver import Stream
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView, PinnedArray
from bitnet_numba.kernels.sampling import edits
from bitnet_numba.kernels.sampling.edits import EditArrays, edit_logits, pack_edits
from bitnet_numba.kernels.sampling.logprobs import NONE, RECORD, logprobs
from bitnet_numba.logprobs import LogprobRows
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import MAX_LOGIT_BIAS, SamplingParams

MAX_SCORED = 128  # tokens of a prompt whose logits are computed at a time
Write = Callable[..., None]  # see `Uploads.write`


class Asked(NamedTuple):
    """What of it a request asks for, or the requests of a step."""

    edits: bool = False  # masks among them
    logprobs: bool = False


NOTHING = Asked()


def asked_by(each: Iterable[SamplingParams], masked: bool = False) -> Asked:
    """What some requests ask for together. masked: the form of an answer is given, too."""
    all_of_them = list(each)
    edits = masked or any(own.edits_logits for own in all_of_them)
    return Asked(edits, any(own.logprobs is not None for own in all_of_them))


class Extras:
    """Of sequences in slots: what is done to their logits, and what is told of their tokens."""

    def __init__(self, model: CudaModel, state: SequenceState, rows: int, ring: "Records | None" = None):
        """rows: most rows of logits at a time. ring: where kernels write records, by position; None: a step's are left
        in `ids` and `values`, by row."""
        device, slots = model.device, state.slots
        self._model, self._state = model, state
        self._ring_size = 0 if ring is None else ring.count
        self.masks = Masks(device, rows, model.config.vocab_size)
        self._edits = EditArrays(
            device.zeros(slots * edits.SETTINGS, np.float64),
            device.zeros(slots * edits.MAX_LISTED, np.int32),
            device.zeros(slots * MAX_LOGIT_BIAS, np.float32),
            self.masks.masks,
            self.masks.mask_ids,
        )
        self._wanted = device.array(np.full(slots, NONE, np.int32))
        self._edited = device.empty(rows * model.config.vocab_size, np.float32)
        self.ids: DeviceArray | PinnedArray
        self.values: DeviceArray | PinnedArray
        if ring is None:
            self.ids, self.values = device.empty(rows * RECORD, np.int32), device.empty(rows * RECORD, np.float32)
        else:
            self.ids, self.values = ring.ids, ring.values

    def set_slot(self, write: Write, slot: int, params: SamplingParams, prompt_length: int, masked: bool) -> None:
        """Enqueues what a slot's sequence asks for. masked: each of its rows comes with a mask."""
        settings, listed, biases = pack_edits(params, prompt_length, masked)
        write(self._edits.settings, settings, slot * edits.SETTINGS)
        if params.biases or params.min_tokens:  # else no step looks at them
            write(self._edits.listed, listed, slot * edits.MAX_LISTED)
            write(self._edits.biases, biases, slot * MAX_LOGIT_BIAS)
        write(self._wanted, [NONE if params.logprobs is None else params.logprobs], slot)

    def around(
        self,
        sampler: Callable[[DeviceArray], Launch],
        asked: Asked,
        logits: DeviceArray,
        slot_positions: DeviceArray,
        ahead: int,
        num_rows: int,
    ) -> list[Launch]:
        """A sampler, whose logits are given to it, and what is asked for around it.

        ahead: how far the tokens that it has chosen are from the positions of slot_positions.
        """
        device, vocab, sequences = self._model.device, self._model.config.vocab_size, self._state.arrays
        if not asked.edits:
            launches = [sampler(logits)]
        else:
            launches = [
                edit_logits(device, logits, vocab, sequences, slot_positions, self._edits, self._edited, num_rows),
                sampler(self._edited),
            ]
        if asked.logprobs:
            launches.append(
                logprobs(
                    device, logits, vocab, sequences, slot_positions, ahead, self._wanted, self.ids, self.values,
                    num_rows, self._ring_size,
                )
            )  # fmt: skip
        return launches

    def close(self) -> None:
        """Frees the memory."""
        own = [self._edits.settings, self._edits.listed, self._edits.biases, self._wanted, self._edited]
        for array in own if self._ring_size else [*own, self.ids, self.values]:
            array.close()
        self.masks.close()


class Records:
    """Places for records in page-locked memory."""

    def __init__(self, count: int):
        self.count = count
        self.ids, self.values = PinnedArray(count * RECORD, np.int32), PinnedArray(count * RECORD, np.float32)

    def download(self, stream: Stream, extras: Extras, first: int, count: int) -> None:
        """Enqueues the copy of a step's first `count` records to places from `first` on."""
        nbytes = 4 * RECORD
        stream.download(self.ids, nbytes * first, extras.ids.address, nbytes * count)
        stream.download(self.values, nbytes * first, extras.values.address, nbytes * count)

    def read(self, first: int, tokens: Sequence[int], tops: Sequence[int]) -> LogprobRows:
        """The records of these tokens at places from `first` on; see `read_records`."""
        places = slice(first * RECORD, (first + len(tokens)) * RECORD)
        return read_records(self.ids.host[places], self.values.host[places], tokens, tops)

    def close(self) -> None:
        """Frees the memory."""
        self.ids.close()
        self.values.close()


class PromptScorer:
    """Log probabilities of the tokens of prompts, from rows that a pass has left in the model's buffers."""

    def __init__(self, model: CudaModel, state: SequenceState):
        device = model.device
        self._model, self._state = model, state
        self._lm_head = LMHead(model, MAX_SCORED)
        self._wanted = device.array(np.full(state.slots, NONE, np.int32))
        self._ids = device.empty(MAX_SCORED * RECORD, np.int32)
        self._values = device.empty(MAX_SCORED * RECORD, np.float32)

    def score(
        self, stream: Stream, write: Write, slot: int, first_row: int, tokens: Sequence[int], top: int
    ) -> list[TokenLogprob]:
        """Waits for the pass under way. tokens: those after the tokens of its rows from `first_row` on.

        Raises ValueError if a logit is not finite.
        """
        model, b = self._model, self._model.buffers
        hidden, vocab = model.config.hidden_size, model.config.vocab_size
        write(self._wanted, [top], slot)
        result: list[TokenLogprob] = []
        for start in range(0, len(tokens), MAX_SCORED):
            part, row = tokens[start : start + MAX_SCORED], first_row + start
            h = DeviceView(b.h.address + 4 * row * hidden, len(part) * hidden, np.float32)
            where = DeviceView(b.slot_positions.address + 8 * row, 2 * len(part), np.int32)
            tell = logprobs(
                model.device, self._lm_head.logits, vocab, self._state.arrays, where, 1, self._wanted, self._ids,
                self._values, len(part),
            )  # fmt: skip
            for launch in [*self._lm_head.launches(len(part), h), tell]:
                launch(stream.handle)
            stream.synchronize()
            ids, values = np.empty(len(part) * RECORD, np.int32), np.empty(len(part) * RECORD, np.float32)
            self._ids.read_into(ids)
            self._values.read_into(values)
            if not np.isfinite(values.reshape(-1, RECORD)[:, : 1 + min(top, vocab)]).all():
                raise ValueError("logits hold NaN or infinity")
            tops = [min(top, vocab)] * len(part)
            result += [each for each in read_records(ids, values, part, tops) if each is not None]
        return result

    def close(self) -> None:
        """Frees the memory."""
        self._lm_head.close()
        for array in (self._wanted, self._ids, self._values):
            array.close()


def read_records(
    ids: NDArray[np.int32], values: NDArray[np.float32], tokens: Sequence[int], tops: Sequence[int]
) -> LogprobRows:
    """Records of tokens, as `kernels.sampling.logprobs` writes them; tops: how many of the most likely tokens each has,
    or NONE."""
    return LogprobRows.pack(tokens, tops, ids.reshape(-1, RECORD)[:, 1:], values.reshape(-1, RECORD))
