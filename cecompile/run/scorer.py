"""The scorer: from questions to loglikelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cecompile.engine.attention import stock_attention
from cecompile.engine.forward import Readouts
from cecompile.results.clock import Clock
from cecompile.results.journal import Journal
from cecompile.run.language_model import LanguageModel, Workload, timed
from cecompile.run.passes import Named, run_passes, score_sequences_alone
from cecompile.run.progress import Progress
from cecompile.run.resume import begin
from cecompile.tasks.question import Question
from cecompile.workload.encode import encode, max_input_length
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass

Outcome = tuple[NDArray[np.float64], NDArray[np.bool_]]  # per sequence: loglikelihood, and whether all is the argmax
Inference = Callable[[Journal | None], Outcome]


@dataclass(frozen=True, slots=True)
class Scores:
    """Per question, in order, one entry per choice: summed log-probabilities, and whether greedy decoding says it.

    `inference_s` are the seconds of each run of the inference phase.
    """

    loglikelihoods: list[tuple[float, ...]]
    greedy: list[tuple[bool, ...]]
    workload: Workload
    inference_s: list[float]


class Scorer(LanguageModel):
    """Scores questions with one model. Made by `from_pretrained`; weights are loaded by the first `score`."""

    def prepare(self, questions: Sequence[Question], *, fit: bool = False) -> Workload:
        """See `LanguageModel.prepare`."""
        encoded = encode(questions, self.tokenizer, max_input_length(self.runtime.config, self.tokenizer))
        return self.workload(encoded.sequences, fit, encoded.truncated_questions)

    def score(
        self, questions: Sequence[Question], *, clock: Clock | None = None, progress: Progress = lambda *_: None,
        repeat: int = 1, journal: Journal | None = None,
    ) -> Scores:  # fmt: skip
        """Loglikelihoods of every choice of every question.

        Args:
            questions: at least one.
            clock: books the phases `preprocess`, `load_model`, `warmup` and `inference`, and is left in the last.
            progress: called as (phase, done, total) while warming up and inferring.
            repeat: times to run the inference phase.
            journal: takes what is finished, and gives what an interrupted run has finished.

        Raises:
            UserError: the questions or the checkpoint cannot be used, or the journal is another run's or cannot be
                written.
            CheckError: the model gives a loglikelihood that is not a number, what runs is not what the stock model
                computes, a pass fails, or the cache is not warm and has to be.
        """
        clock = clock or Clock()
        clock.enter("preprocess")
        prepared = self.prepare(questions, fit=True)
        owner = prepared.sequences.questions
        run, workload = self._inference(prepared, clock, progress, lambda i: f"question '{questions[owner[i]].id}'")
        begin(self.runtime, workload, journal)
        clock.enter("inference")
        outcome, seconds = timed(run, repeat, journal, self.runtime.ranks)
        loglikelihoods, greedy = _by_question(questions, workload, *outcome)
        return Scores(loglikelihoods, greedy, workload, seconds)

    def score_sequences(self, sequences: Sequences, *, progress: Progress = lambda *_: None) -> Outcome:
        """The same for token sequences: (n,) loglikelihoods, and (n,) whether greedy decoding says all of each.

        Args:
            sequences: at least one.
            progress: see `score`.

        Raises:
            UserError, CheckError: see `score`.
        """
        run, _ = self._inference(self.workload(sequences, fit=True), Clock(), progress, lambda i: f"request {i}")
        return run(None)

    def _inference(
        self, workload: Workload, clock: Clock, progress: Progress, named: Named
    ) -> tuple[Inference, Workload]:
        """Loads and warms up; returns what scores all sequences, and the workload as it is planned in the end."""
        ranks = self.runtime.ranks
        if workload.plan is None:
            clock.enter("load_model")
            model, stock, sequences = self.runtime.load(), self.runtime.weights.stock_attention, workload.sequences

            def alone(journal: Journal | None) -> Outcome:
                with stock_attention(model, stock):
                    return score_sequences_alone(model, sequences, progress, named, journal, ranks)

            return alone, workload
        warmed, staged, workload = self.warm(workload, clock, progress)
        count = len(workload.sequences)

        def run(journal: Journal | None) -> Outcome:
            return collect(count, staged, run_passes(warmed.engine, staged, progress, named, journal, ranks))

        return run, workload


def collect(count: int, staged: Sequence[StagedPass], readouts: Sequence[Readouts]) -> Outcome:
    """Sums readouts by sequence, in float64: (count,) loglikelihoods and whether every argmax was the target."""
    loglikelihood = np.zeros(count)
    misses = np.zeros(count, dtype=np.int64)
    for one, out in zip(staged, readouts, strict=True):
        np.add.at(loglikelihood, one.choice, out.logprob)
        np.add.at(misses, one.choice, out.argmax != one.target)
    return loglikelihood, misses == 0


def _by_question(
    questions: Sequence[Question],
    workload: Workload,
    loglikelihood: NDArray[np.float64],
    greedy: NDArray[np.bool_],
) -> tuple[list[tuple[float, ...]], list[tuple[bool, ...]]]:
    bounds = np.searchsorted(workload.sequences.questions, np.arange(1, len(questions)))
    return (
        [tuple(part.tolist()) for part in np.split(loglikelihood, bounds)],
        [tuple(part.tolist()) for part in np.split(greedy, bounds)],
    )
