"""Work that is journaled: what the journal has is taken from there, the rest is done, and journaled when it is."""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cecompile.engine.forward import Engine, Readouts
from cecompile.engine.reference import score_alone
from cecompile.engine.stock_pipeline import StockPipeline
from cecompile.errors import CheckError, first_line
from cecompile.partitioned.pipeline import LostError
from cecompile.partitioned.streaming import StreamingEngine
from cecompile.ranks import Ranks
from cecompile.results.journal import ANSWERS, PASSES, Journal
from cecompile.run.progress import Counter, Progress
from cecompile.workload.sequences import Ints, Sequences
from cecompile.workload.stage import StagedPass

UNIT = 2  # rows per lane that a rank decodes at once, where several share them
Named = Callable[[int], str]  # what a user knows a sequence as
Write = Callable[[Sequence[Ints], Sequence[int], Callable[[int, list[int]], None]], None]
_SCORE = struct.Struct("<d?")


def run_passes(
    engine: Engine | StreamingEngine, staged: Sequence[StagedPass], progress: Progress, named: Named,
    journal: Journal | None, ranks: Ranks,
) -> list[Readouts]:  # fmt: skip
    """The readouts of all passes, in order.

    Args:
        engine: warm.
        staged: the passes.
        progress: called as ("inference", done, total).
        named: for messages.
        journal: begun; None does without.
        ranks: that share the passes.

    Raises:
        CheckError: a log-probability is not a number, a pass fails, or a rank was lost.
        UserError: see `Journal.add`.
    """
    kept = {i: _readouts(one, journal.get(PASSES, i)) for i, one in enumerate(staged)} if journal else {}
    out = {i: readouts for i, readouts in kept.items() if readouts is not None}
    left = [i for i in range(len(staged)) if i not in out]
    count = Counter("inference", len(staged), progress, len(out))
    place = {i: number for number, i in enumerate(left, len(out) + 1)}
    taken: list[int] = []
    mine: dict[int, Readouts] = {}
    gone = 0  # passes that this rank has handed on to the next stage

    def passes() -> Iterator[StagedPass]:
        for i in ranks.claim(PASSES, left):
            taken.append(i)
            yield staged[i]

    def handed_on(*_: Any) -> None:
        nonlocal gone
        gone += 1
        count.reach(place[taken[gone - 1]])

    def done(one: StagedPass, readouts: Readouts) -> None:
        _refuse_nonsense(one.choice, readouts.logprob, named)
        i = taken[len(mine)]
        mine[i] = readouts
        if journal is not None:
            journal.add(PASSES, i, readouts.logprob.astype("<f4").tobytes() + readouts.argmax.astype("<i4").tobytes())
        ranks.tally(one.tokens)
        count.reach(place[i])

    stage = engine.stage if isinstance(engine, Engine) else None
    with _failure_in_one_line(lambda: f"after {len(out) + len(mine)} of {len(staged)} passes"):
        try:
            engine.run(passes(), done if stage is None or stage.ends else handed_on)
        except LostError:
            raise ranks.lost() from None
    out |= ranks.collect(mine)
    return [out[i] for i in range(len(staged))]


def _readouts(one: StagedPass, payload: bytes | None) -> Readouts | None:
    """A journaled pass's."""
    if payload is None or len(payload) != 8 * len(one.entry):
        return None
    half = len(payload) // 2
    return Readouts(
        np.frombuffer(payload[:half], "<f4").astype(np.float32), np.frombuffer(payload[half:], "<i4").astype(np.int32)
    )


def score_sequences_alone(
    model: PreTrainedModel, sequences: Sequences, progress: Progress, named: Named, journal: Journal | None,
    ranks: Ranks,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:  # fmt: skip
    """`score_one_by_one`, journaled by sequence; args, raises: see `run_passes`."""
    kept = {i: journal.get(PASSES, i) for i in range(len(sequences))} if journal else {}
    out = {i: _SCORE.unpack(payload) for i, payload in kept.items() if payload and len(payload) == _SCORE.size}
    left = [i for i in range(len(sequences)) if i not in out]
    count = Counter("inference", len(sequences), progress, len(out))
    mine: dict[int, tuple[float, bool]] = {}
    for number, i in enumerate(ranks.claim(PASSES, left), len(out)):
        with _failure_in_one_line(lambda number=number: f"after {number} of {len(sequences)} sequences"):  # type: ignore[misc]
            mine[i] = score_alone(model, sequences, i)
        _refuse_nonsense(np.array([i]), np.array(mine[i][:1]), named)
        if journal is not None:
            journal.add(PASSES, i, _SCORE.pack(*mine[i]))
        ranks.tally(len(sequences.inputs(i)))
        count()
    out |= ranks.collect(mine)
    loglikelihood, greedy = zip(*(out[i] for i in range(len(sequences))), strict=True)
    return np.array(loglikelihood), np.array(greedy, dtype=bool)


def answer_alone(
    stock: StockPipeline,
    conversations: Sequence[list[dict[str, str]]],
    new_tokens: int,
    progress: Progress,
    journal: Journal | None,
    ranks: Ranks,
) -> list[str]:
    """The pipeline's answers, journaled by question; raises: see `run_passes`."""
    kept = {i: journal.get(ANSWERS, i) for i in range(len(conversations))} if journal else {}
    out = {i: payload.decode() for i, payload in kept.items() if payload is not None}
    left = [i for i in range(len(conversations)) if i not in out]
    count = Counter("inference", len(conversations), progress, len(out))
    mine: dict[int, str] = {}
    for number, i in enumerate(ranks.claim(ANSWERS, left), len(out)):
        with _failure_in_one_line(lambda number=number: f"after {number} of {len(conversations)} answers"):  # type: ignore[misc]
            mine[i] = stock.answer(conversations[i], new_tokens)
        if journal is not None:
            journal.add(ANSWERS, i, mine[i].encode())
        count()
    out |= ranks.collect(mine)
    return [out[i] for i in range(len(conversations))]


def write_answers(
    rows: Mapping[int, tuple[Ints, int]], write: Write, progress: Progress, journal: Journal | None, ranks: Ranks,
    lanes: int,
) -> dict[int, list[int]]:  # fmt: skip
    """The tokens that greedy decoding writes after each row, journaled by row; raises: see `run_passes`.

    Args:
        rows: by question, the tokens it begins with, and the most tokens to write.
        write: decodes; is given both for all rows to do, and what to call with each row and its tokens.
        progress: called as ("decoding", done, total) if there is something to decode.
        journal: see `run_passes`.
        ranks: that share the rows. Which are decoded together is the same for any number of them; one process alone
            decodes all together.
        lanes: rows that are written at the same time.
    """
    kept = {i: journal.get(ANSWERS, i) for i in rows} if journal else {}
    out = {i: np.frombuffer(payload, "<i4").tolist() for i, payload in kept.items() if payload is not None}
    if not rows:
        return out
    count = Counter("decoding", len(rows), progress, len(out))
    mine: dict[int, list[int]] = {}
    for unit in ranks.claim(ANSWERS, [list(rows)] if ranks.size == 1 else _units(rows, UNIT * lanes)):
        left = [i for i in unit if i not in out]

        def done(row: int, tokens: list[int], left: list[int] = left) -> None:
            mine[left[row]] = tokens
            if journal is not None:
                journal.add(ANSWERS, left[row], np.array(tokens, dtype="<i4").tobytes())
            count()

        with _failure_in_one_line(lambda: f"after {len(out) + len(mine)} of {len(rows)} answers decoded"):
            write([rows[i][0] for i in left], [rows[i][1] for i in left], done)
    return out | ranks.collect(mine)


def _units(rows: Mapping[int, tuple[Ints, int]], size: int) -> list[list[int]]:
    """Rows that are decoded together, those that may take longest first."""
    order = sorted(rows, key=lambda i: -(len(rows[i][0]) + rows[i][1]))
    return [order[at : at + size] for at in range(0, len(order), size)]


def _refuse_nonsense(sequence: Any, values: Any, named: Named) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise CheckError(
            f"{named(int(sequence[bad[0]]))}: the model's log-probability is {values[bad[0]]}; no result was written"
        )


@contextmanager
def _failure_in_one_line(where: Callable[[], str]) -> Iterator[None]:
    """An error of the device or of torch, as one line; `where` says how far the run had come."""
    try:
        yield
    except RuntimeError as error:
        raise CheckError(f"inference failed {where()}: {first_line(error)}") from error
