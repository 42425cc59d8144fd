"""Decoding many rows over one cache: the tokens that each step reads, and the slots for their keys and values.

Each row in flight has a segment of the cache's slots, as long as its prompt and its longest answer together. A row
takes a free segment, reads its prompt in as few steps as fit, writes a token a step, and frees the segment. The tokens
with which all prompts begin are read once, into the first slots, which every row sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cecompile.workload.sequences import Ints


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """The fixed sizes of a decoder. Attention knows a step by having fewer tokens than `slots`, unlike a tree pass."""

    slots: int  # the cache's slots; the last slot is for padding
    lanes: int  # the most rows in flight
    step_tokens: tuple[int, ...]  # the sizes of a step in tokens, largest first; the last is `lanes`

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slots, self.lanes, *self.step_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens to read at once."""

    token_ids: Ints  # (tokens,)
    slot: Ints  # (tokens,) each token's slot in the cache
    first: Ints  # (tokens,) the slot of each token, less its position; its segment begins `shared` slots later
    read: Ints  # (n,) indices of the step's tokens after which the next token is read out
    target: Ints  # (n,) tokens whose log-probabilities are computed after them
    shared: Ints  # (1,) the number of tokens, in the first slots, with which all rows begin


@dataclass(slots=True)
class _Lane:
    row: int
    first: int
    size: int
    pending: list[int]  # tokens not yet in the cache
    cached: int = 0
    written: list[int] = field(default_factory=list)


class DecodeSchedule:
    """The host's part of greedy decoding. Tokens in `stop` end an answer.

    Args:
        prompts: each row's prompt, of at least one token.
        room: for each row, the most tokens to write; at least 1.

    Attributes:
        written: each row's answer, once finished.

    Raises:
        ValueError: a row does not fit into the cache.
    """

    def __init__(self, prompts: Sequence[Ints], room: Sequence[int], stop: frozenset[int], shape: DecodeShape) -> None:
        self._prompts, self._room, self._stop, self._shape = prompts, room, stop, shape
        self._shared = _common(prompts)
        self._beginning = [*enumerate(prompts[0][: self._shared].tolist())] if prompts else []  # (slot, token) to read
        # the last token written is not read
        self._needed = [len(prompt) + most - 1 for prompt, most in zip(prompts, room, strict=True)]  # slots per row
        if max(self._needed, default=0) > shape.slots - 1:
            raise ValueError(f"a row of {max(self._needed)} slots in a cache of {shape.slots - 1}")
        self._waiting = sorted(range(len(prompts)), key=lambda row: -self._needed[row])
        self._lanes: list[_Lane] = []
        self._asked: list[_Lane] = []
        self.written: list[list[int]] = [[] for _ in prompts]

    def next(self) -> Step | None:
        """The tokens to read next; None when every row is done."""
        self._admit()
        if not self._lanes:
            return None
        reading = any(len(lane.pending) > 1 for lane in self._lanes)
        left = self._shape.step_tokens[0 if reading or self._beginning else -1]
        cells = [(token, slot, 0) for slot, token in self._beginning[:left]]  # (token, slot, slot less position)
        del self._beginning[:left]
        read: list[int] = []
        self._asked = []
        for lane in self._lanes:
            taken = lane.pending[: left - len(cells)]
            del lane.pending[: len(taken)]
            begins = lane.first - self._shared
            cells += [(token, slot, begins) for slot, token in enumerate(taken, lane.first + lane.cached)]
            lane.cached += len(taken)
            if taken and not lane.pending:
                read.append(len(cells) - 1)
                self._asked.append(lane)
        parts = (*zip(*cells, strict=True), read, [0] * len(read), [self._shared])
        return Step(*(np.array(values, dtype=np.int32) for values in parts))

    def take(self, argmax: Ints) -> list[int]:
        """Adds the most likely tokens after the last step's readouts. Returns the rows that are now done."""
        done = []
        for lane, token in zip(self._asked, argmax.tolist(), strict=True):
            lane.written.append(token)
            if token in self._stop or len(lane.written) == self._room[lane.row]:
                self.written[lane.row] = lane.written
                self._lanes.remove(lane)
                done.append(lane.row)
            else:
                lane.pending = [token]
        return done

    def _admit(self) -> None:
        """Gives lanes and segments to waiting rows, longest first, each in the first gap that is long enough."""
        if len(self._lanes) == self._shape.lanes:
            return
        taken = sorted((lane.first, lane.first + lane.size) for lane in self._lanes)
        begins, ends = [self._shared, *(end for _, end in taken)], [*(at for at, _ in taken), self._shape.slots - 1]
        waiting = []
        for row in self._waiting:
            size = self._needed[row] - self._shared
            gap = next((i for i, begin in enumerate(begins) if ends[i] - begin >= size), None)
            if gap is None or len(self._lanes) == self._shape.lanes:
                waiting.append(row)
                continue
            self._lanes.append(_Lane(row, begins[gap], size, self._prompts[row][self._shared :].tolist()))
            begins[gap] += size
        self._waiting = waiting


def _common(prompts: Sequence[Ints]) -> int:
    """The number of tokens with which all prompts begin; each prompt has at least one token more."""
    most = min((len(prompt) for prompt in prompts), default=1) - 1
    same = np.array([prompt[:most] == prompts[0][:most] for prompt in prompts]).all(axis=0)
    return most if same.all() else int(np.argmin(same))
