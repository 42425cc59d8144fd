"""The scorer: from questions to loglikelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cecompile.engine.attention import stock_attention
from cecompile.engine.forward import Readouts
from cecompile.run.context import Progress, RunContext
from cecompile.run.language_model import LanguageModel, Workload, timed
from cecompile.run.passes import Begun, Named, run_passes, score_sequences_alone
from cecompile.run.resume import begin
from cecompile.tasks.question import Question
from cecompile.workload.encode import encode, max_input_length
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass

Outcome = tuple[NDArray[np.float64], NDArray[np.bool_]]  # per sequence: loglikelihood, and whether all is the argmax
Inference = Callable[[RunContext, Begun | None], Outcome]


@dataclass(frozen=True, slots=True)
class Scores:
    """For each question, in order, each choice's summed log-probability, and whether greedy decoding gives the choice.

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

    def score(self, questions: Sequence[Question], run: RunContext | None = None) -> Scores:
        """Returns the loglikelihood of every choice of every question.

        Args:
            questions: at least one.
            run: the context; None is a new one. The clock is left in the phase `inference`.

        Raises:
            UserError: the questions or the checkpoint cannot be used, or the journal is another run's or cannot be
                written.
            CheckError: a loglikelihood is not a number, the pass disagrees with the stock model, a pass fails, or the
                cache is not warm and `require_warm` is set.
        """
        run = self.in_context(run)
        run.clock.enter("preprocess")
        prepared = self.prepare(questions, fit=True)
        owner = prepared.sequences.questions
        infer, workload, begun = self._inference(prepared, run, lambda i: f"question '{questions[owner[i]].id}'")
        begin(self.runtime, workload, run.journal)
        run.clock.enter("inference")
        outcome, seconds = timed(infer, run, begun)
        bounds = np.searchsorted(workload.sequences.questions, np.arange(1, len(questions)))
        loglikelihoods, greedy = ([tuple(part.tolist()) for part in np.split(each, bounds)] for each in outcome)
        return Scores(loglikelihoods, greedy, workload, seconds)

    def score_sequences(self, sequences: Sequences, *, progress: Progress = lambda *_: None) -> Outcome:
        """Scores n token sequences: (n,) loglikelihoods, and (n,) whether greedy decoding gives all of a sequence.

        Args:
            sequences: at least one.
            progress: see `score`.

        Raises:
            UserError, CheckError: see `score`.
        """
        run = self.in_context(RunContext(progress=progress))
        infer, _, begun = self._inference(self.workload(sequences, fit=True), run, lambda i: f"request {i}")
        return infer(run, begun)

    def _inference(self, workload: Workload, run: RunContext, named: Named) -> tuple[Inference, Workload, Begun | None]:
        """Loads and warms up; returns a function that scores all sequences, the final workload, and what has begun."""
        if workload.plan is None:
            run.clock.enter("load_model")
            model, stock, sequences = self.runtime.load(), self.runtime.weights.stock_attention, workload.sequences

            def alone(run: RunContext, _: Begun | None) -> Outcome:
                with stock_attention(model, stock):
                    return score_sequences_alone(model, sequences, named, run)

            return alone, workload, None
        warm = self.warm(workload, run)
        count = len(warm.workload.sequences)

        def packed(run: RunContext, begun: Begun | None) -> Outcome:
            return collect(count, warm.staged, run_passes(warm.warmed.engine, warm.staged, named, run, begun))

        return packed, warm.workload, warm.begun


def collect(count: int, staged: Sequence[StagedPass], readouts: Sequence[Readouts]) -> Outcome:
    """Sums readouts by sequence, in float64: (count,) loglikelihoods and whether every argmax was the target."""
    loglikelihood = np.zeros(count)
    misses = np.zeros(count, dtype=np.int64)
    for one, out in zip(staged, readouts, strict=True):
        np.add.at(loglikelihood, one.choice, out.logprob)
        np.add.at(misses, one.choice, out.argmax != one.target)
    return loglikelihood, misses == 0
