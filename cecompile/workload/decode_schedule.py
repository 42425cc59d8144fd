"""Decoding many rows over one cache: which tokens the next step reads, and where their keys and values go.

Each row in flight has a segment of the cache's slots, as long as its prompt and its longest answer together. A row
takes a segment when one is free, reads its prompt in as few steps as fit, writes a token a step, and gives its segment
back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cecompile.workload.sequences import Ints


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What a decoder is built for.

    Attributes:
        slots: of the cache, more than any step has tokens, by which attention tells a step from a pass over trees. The
            last is for tokens that nobody sees.
        lanes: rows in flight at most.
        step_tokens: tokens that a step reads, for each size of step, largest first; the last is `lanes`.
    """

    slots: int
    lanes: int
    step_tokens: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slots, self.lanes, *self.step_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens to read at once.

    Attributes:
        token_ids, slot, first: (tokens,) each token, its slot in the cache, and the first slot of its segment.
        read: (n,) the tokens, counted within the step, after which the next token is asked for.
        target: (n,) a token of which to say the log-probability there.
    """

    token_ids: Ints
    slot: Ints
    first: Ints
    read: Ints
    target: Ints


@dataclass(slots=True)
class _Lane:
    row: int
    first: int
    size: int
    pending: list[int]  # tokens not yet in the cache
    cached: int = 0
    written: list[int] = field(default_factory=list)


class DecodeSchedule:
    """Greedy decoding of rows, as far as the host is concerned.

    Args:
        prompts: per row, at least one token to read first.
        room: per row, the most tokens to write; at least 1.
        stop: tokens that end an answer.
        shape: of the decoder.

    Raises:
        ValueError: a row does not fit into the cache.
    """

    def __init__(self, prompts: Sequence[Ints], room: Sequence[int], stop: frozenset[int], shape: DecodeShape) -> None:
        self._prompts, self._room, self._stop, self._shape = prompts, room, stop, shape
        self._free = [(0, shape.slots - 1)]  # (first slot, slots), in order, none beside another
        self._waiting = sorted(range(len(prompts)), key=lambda row: -self._needed(row))
        if self._waiting and self._needed(self._waiting[0]) > shape.slots - 1:
            raise ValueError(f"a row of {self._needed(self._waiting[0])} slots in a cache of {shape.slots - 1}")
        self._lanes: list[_Lane] = []
        self._asked: list[_Lane] = []
        self.written: list[list[int]] = [[] for _ in prompts]

    def next(self) -> Step | None:
        """The tokens to read next; None when every row is done."""
        self._admit()
        if not self._lanes:
            return None
        reading = any(len(lane.pending) > 1 for lane in self._lanes)
        left = self._shape.step_tokens[0 if reading else -1]
        tokens: list[int] = []
        slots: list[int] = []
        firsts: list[int] = []
        read: list[int] = []
        self._asked = []
        for lane in self._lanes:
            taken = lane.pending[: left - len(tokens)]
            del lane.pending[: len(taken)]
            begin = lane.first + lane.cached
            tokens += taken
            slots += range(begin, begin + len(taken))
            firsts += [lane.first] * len(taken)
            lane.cached += len(taken)
            if taken and not lane.pending:
                read.append(len(tokens) - 1)
                self._asked.append(lane)
        as_ints = (np.array(values, dtype=np.int32) for values in (tokens, slots, firsts, read, [0] * len(read)))
        return Step(*as_ints)

    def take(self, argmax: Ints) -> list[int]:
        """Adds the tokens that the last step's readouts say. Returns the rows that are done with it."""
        done = []
        for lane, token in zip(self._asked, argmax.tolist(), strict=True):
            lane.written.append(token)
            if token in self._stop or len(lane.written) == self._room[lane.row]:
                self.written[lane.row] = lane.written
                self._lanes.remove(lane)
                self._release(lane.first, lane.size)
                done.append(lane.row)
            else:
                lane.pending = [token]
        return done

    def _needed(self, row: int) -> int:
        return len(self._prompts[row]) + self._room[row] - 1  # the last token written is not read

    def _admit(self) -> None:
        """Gives waiting rows lanes and segments, those of the longest first."""
        if len(self._lanes) == self._shape.lanes:
            return
        waiting = []
        for row in self._waiting:
            size = self._needed(row)
            hole = next((i for i, (_, free) in enumerate(self._free) if free >= size), None)
            if hole is None or len(self._lanes) == self._shape.lanes:
                waiting.append(row)
                continue
            first, free = self._free[hole]
            self._free[hole : hole + 1] = [(first + size, free - size)] if free > size else []
            self._lanes.append(_Lane(row, first, size, self._prompts[row].tolist()))
        self._waiting = waiting

    def _release(self, first: int, size: int) -> None:
        self._free = sorted([*self._free, (first, size)])
        joined = self._free[:1]
        for begin, free in self._free[1:]:
            last, held = joined[-1]
            if last + held == begin:
                joined[-1] = (last, held + free)
            else:
                joined.append((begin, free))
        self._free = joined
