"""Resumable work: an item that the journal holds is taken from there; any other item is done, then journaled."""

import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cecompile.engine.forward import Engine, Readouts
from cecompile.engine.reference import score_alone
from cecompile.engine.stock_pipeline import StockPipeline
from cecompile.errors import CheckError, RecurringError, first_line
from cecompile.partitioned.pipeline import LostError
from cecompile.partitioned.streaming import StreamingEngine
from cecompile.results.journal import ANSWERS, PASSES
from cecompile.run.context import Counter, RunContext
from cecompile.workload.sequences import Ints, Sequences
from cecompile.workload.stage import StagedPass

UNIT = 2  # rows per lane that a rank decodes at once, where several share them
Named = Callable[[int], str]  # the user's name for a sequence
Write = Callable[[Sequence[Ints], Sequence[int], Callable[[int, list[int]], None]], None]
Unit = TypeVar("Unit")
Result = TypeVar("Result")
_SCORE = struct.Struct("<d?")


@dataclass(frozen=True, slots=True)
class Begun:
    """Passes that ran as an engine was checked, from the moment `began` to `ended` by `time.perf_counter()`.

    Their readouts are kept, so that they need not run again, and their time counts as inference.
    """

    passes: Sequence[tuple[StagedPass, Readouts]]
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def among(self, staged: Sequence[StagedPass]) -> dict[int, Readouts]:
        """The readouts by place in `staged`; empty for the passes of another plan."""
        places = {id(one): place for place, one in enumerate(staged)}
        return {places[id(one)]: readouts for one, readouts in self.passes if id(one) in places}


class Work(Generic[Result]):
    """Numbered items that the ranks of a run share, each done once and then journaled.

    Args:
        run: the context of the run.
        kind: the journal's name for the items, `PASSES` or `ANSWERS`.
        items: the number of each item.
        pack: turns a result into bytes for the journal.
        unpack: turns an item's number and bytes into a result; None for bytes of another form.
        unit: the items' name in messages.
        phase: the phase's name for `RunContext.progress`.

    Attributes:
        kept: results that the journal holds, by item.
        left: items to do.
    """

    def __init__(
        self, run: RunContext, kind: str, items: Sequence[int], pack: Callable[[Result], bytes],
        unpack: Callable[[int, bytes], Result | None], unit: str, phase: str = "inference",
    ) -> None:  # fmt: skip
        stored = {i: run.journal.get(kind, i) for i in items} if run.journal else {}
        unpacked = {i: unpack(i, payload) for i, payload in stored.items() if payload is not None}
        self.kept: dict[int, Result] = {i: result for i, result in unpacked.items() if result is not None}
        self.left = [i for i in items if i not in self.kept]
        self._run, self._kind, self._pack = run, kind, pack
        self._mine: dict[int, Result] = {}
        self._of = f"of {len(items)} {unit}"
        self._place = {i: place for place, i in enumerate(self.left, len(self.kept) + 1)}
        self._count = Counter(phase, len(items), run.progress, len(self.kept))

    def claim(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Iterates over units of this work, such as `left`, that no other rank does; see `Ranks.claim`."""
        return self._run.ranks.claim(self._kind, units)

    def done(self, item: int, result: Result, in_order: bool = True) -> None:
        """Journals an item's result and shows progress; `in_order` where ranks finish items in the order of `left`.

        Raises:
            UserError: see `Journal.add`.
        """
        self._mine[item] = result
        if self._run.journal is not None:
            self._run.journal.add(self._kind, item, self._pack(result))
        if in_order:
            self.reach(item)
        else:
            self._count()

    def reach(self, item: int) -> None:
        """Shows progress up to an item, whose result another rank may have."""
        self._count.reach(self._place[item])

    def results(self) -> dict[int, Result]:
        """Returns the results of all items, from the journal and from all ranks."""
        return self.kept | self._run.ranks.collect(self._mine)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turns an error of the device or of torch into one line that says how far the run had come."""
        try:
            yield
        except RuntimeError as error:
            done = len(self.kept) + len(self._mine)
            raise CheckError(f"inference failed after {done} {self._of}: {first_line(error)}") from error


def run_passes(
    engine: Engine | StreamingEngine, staged: Sequence[StagedPass], named: Named, run: RunContext,
    begun: Begun | None = None,
) -> list[Readouts]:  # fmt: skip
    """Returns the readouts of all passes, in order.

    Args:
        engine: warm.
        staged: the passes.
        named: names a sequence in messages.
        run: the context, with a journal that has begun.
        begun: passes that have run already.

    Raises:
        CheckError: a log-probability is not a number, a pass fails, or a rank was lost.
        UserError: see `Journal.add`.
    """
    work = Work(run, PASSES, range(len(staged)), _packed, lambda i, data: _readouts(staged[i], data), "passes")
    claimed: deque[int] = deque()  # passes under way
    before = {} if begun is None else begun.among(staged)

    def passes() -> Iterator[StagedPass]:
        for i in work.claim(work.left):
            if i in before:
                finish(i, before[i])
            else:
                claimed.append(i)
                yield staged[i]

    def finish(i: int, readouts: Readouts) -> None:
        _refuse_nonsense(staged[i].choice, readouts.logprob, named)
        run.ranks.tally(staged[i].tokens)
        work.done(i, readouts)

    def done(_: StagedPass, readouts: Readouts) -> None:
        finish(claimed.popleft(), readouts)

    def handed_on(*_: Any) -> None:
        work.reach(claimed.popleft())

    stage = engine.stage if isinstance(engine, Engine) else None
    with work.failing():
        try:
            engine.run(passes(), done if stage is None or stage.ends else handed_on)
        except LostError:
            raise run.ranks.lost() from None
    results = work.results()
    return [results[i] for i in range(len(staged))]


def _packed(readouts: Readouts) -> bytes:
    return readouts.logprob.astype("<f4").tobytes() + readouts.argmax.astype("<i4").tobytes()


def _readouts(one: StagedPass, data: bytes) -> Readouts | None:
    """The readouts of a pass from `_packed` bytes; None for bytes of another length."""
    count = len(one.entry)
    if len(data) != 8 * count:
        return None
    logprob, argmax = np.frombuffer(data, "<f4", count), np.frombuffer(data, "<i4", count, 4 * count)
    return Readouts(logprob.astype(np.float32), argmax.astype(np.int32))


def score_sequences_alone(
    model: PreTrainedModel, sequences: Sequences, named: Named, run: RunContext
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores sequence after sequence with the stock model; args, raises: see `run_passes`.

    Returns:
        (n,) loglikelihoods, and (n,) whether greedy decoding says all of each sequence.
    """

    def unpack(_: int, data: bytes) -> tuple[float, bool] | None:
        return _SCORE.unpack(data) if len(data) == _SCORE.size else None

    work = Work(run, PASSES, range(len(sequences)), lambda result: _SCORE.pack(*result), unpack, "sequences")
    for i in work.claim(work.left):
        with work.failing():
            result = score_alone(model, sequences, i)
        _refuse_nonsense(np.array([i]), np.array(result[:1]), named)
        run.ranks.tally(len(sequences.inputs(i)))
        work.done(i, result)
    results = work.results()
    loglikelihood, greedy = zip(*(results[i] for i in range(len(sequences))), strict=True)
    return np.array(loglikelihood), np.array(greedy, dtype=bool)


def answer_alone(
    stock: StockPipeline, conversations: Sequence[list[dict[str, str]]], new_tokens: int, run: RunContext
) -> list[str]:
    """Returns the stock pipeline's answers, asked one question after another; raises: see `run_passes`."""
    items = range(len(conversations))
    work = Work(run, ANSWERS, items, str.encode, lambda _, data: data.decode(), "answers")
    for i in work.claim(work.left):
        with work.failing():
            text = stock.answer(conversations[i], new_tokens)
        work.done(i, text)
    results = work.results()
    return [results[i] for i in items]


def write_answers(
    rows: Mapping[int, tuple[Ints, int]], write: Write, run: RunContext, lanes: int
) -> dict[int, list[int]]:
    """Returns the tokens that greedy decoding writes after each row; raises: see `run_passes`.

    Ranks decode the same rows together however many ranks there are, but one process alone decodes all rows together.

    Args:
        rows: by question, the tokens that the row begins with, and the most tokens to write.
        write: decodes. Called with the beginnings and the room of several rows, and with a function that takes the
            number and the tokens of each row that is done.
        run: the context. Progress is shown as ("decoding", done, total) if there are rows.
        lanes: rows that are written at the same time.
    """
    if not rows:
        return {}

    def pack(tokens: list[int]) -> bytes:
        return np.array(tokens, dtype="<i4").tobytes()

    def unpack(_: int, data: bytes) -> list[int]:
        tokens: list[int] = np.frombuffer(data, "<i4").tolist()
        return tokens

    work = Work(run, ANSWERS, list(rows), pack, unpack, "answers decoded", "decoding")
    for unit in work.claim([list(rows)] if run.ranks.size == 1 else _units(rows, UNIT * lanes)):
        left = [i for i in unit if i not in work.kept]

        def done(row: int, tokens: list[int], left: list[int] = left) -> None:
            work.done(left[row], tokens, in_order=False)

        with work.failing():
            write([rows[i][0] for i in left], [rows[i][1] for i in left], done)
    return work.results()


def _units(rows: Mapping[int, tuple[Ints, int]], size: int) -> list[list[int]]:
    """Rows that are decoded together, those that may take longest first."""
    order = sorted(rows, key=lambda i: -(len(rows[i][0]) + rows[i][1]))
    return [order[at : at + size] for at in range(0, len(order), size)]


def _refuse_nonsense(sequence: Any, values: Any, named: Named) -> None:
    bad = np.flatnonzero(np.isnan(values) | np.isposinf(values))  # minus infinity: a head may rule tokens out
    if len(bad):
        fault = f"the model's log-probability is {values[bad[0]]}"
        raise RecurringError(f"{named(int(sequence[bad[0]]))}: {fault}; no result was written")
