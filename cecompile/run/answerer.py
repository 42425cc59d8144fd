"""The answerer: from chat questions to the text that greedy decoding writes, read from token trees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cecompile.engine.attention import stock_attention
from cecompile.engine.decode import Decoder
from cecompile.engine.forward import Readouts
from cecompile.engine.stock_pipeline import StockPipeline, stop_tokens
from cecompile.errors import UserError
from cecompile.model.checkpoint import load_generation_config
from cecompile.results.clock import Clock
from cecompile.results.journal import Journal
from cecompile.run.language_model import LanguageModel, Workload, timed
from cecompile.run.passes import answer_alone, run_passes, write_answers
from cecompile.run.progress import Progress
from cecompile.run.resume import begin
from cecompile.run.runtime import Runtime
from cecompile.tasks.chat import NEW_TOKENS, ChatQuestion
from cecompile.workload.chat_tree import Walk, graft, prompts_of, walk
from cecompile.workload.decode_schedule import DecodeSchedule
from cecompile.workload.encode import max_input_length
from cecompile.workload.sequences import Ints
from cecompile.workload.stage import StagedPass


@dataclass(frozen=True, slots=True)
class Answer:
    """One question's answer.

    Attributes:
        text: as `transformers`' text-generation pipeline returns it.
        token_ids: what the model wrote, the end token included; None where the pipeline itself ran.
        decoded_tokens: how many of them were decoded outside the tree; None likewise.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    decoded_tokens: int | None = None

    @property
    def tokens(self) -> int | None:
        return None if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers in the order of the questions; `inference_s` are the seconds of each run of the inference phase."""

    answers: list[Answer]
    workload: Workload
    inference_s: list[float]


class Answerer(LanguageModel):
    """Answers chat questions with one model. Made by `from_pretrained`; weights are loaded by the first `answer`.

    Args:
        new_tokens: the most tokens of an answer.
    """

    def __init__(self, runtime: Runtime, tokenizer: object, new_tokens: int = NEW_TOKENS) -> None:
        if new_tokens < 1:
            raise UserError(f"new tokens: {new_tokens} is too few, at least 1")
        if runtime.planner.sizing.stages > 1:
            raise UserError("--pipeline: chat answers that leave their tree are written by one device with all layers")
        super().__init__(runtime, tokenizer, new_tokens)

    def prepare(self, questions: Sequence[ChatQuestion], *, fit: bool = False) -> Workload:
        """See `LanguageModel.prepare`."""
        runtime = self.runtime
        if runtime.mode.engine != "reference":
            self._stop_tokens()
        longest = max_input_length(runtime.config, self.tokenizer)
        sequences = graft(questions, self.tokenizer, longest, self.new_tokens)
        return self.workload(sequences, fit)

    def answer(
        self, questions: Sequence[ChatQuestion], *, clock: Clock | None = None,
        progress: Progress = lambda *_: None, repeat: int = 1, journal: Journal | None = None,
    ) -> Answers:  # fmt: skip
        """The answer of greedy decoding to every question.

        Args, raises: see `Scorer.score`.
        """
        clock = clock or Clock()
        clock.enter("preprocess")
        workload = self.prepare(questions, fit=True)
        if workload.plan is None:
            run = self._one_by_one(questions, clock, progress)
        else:
            run, workload = self._packed(questions, workload, clock, progress)
        begin(self.runtime, workload, journal, self.new_tokens)
        clock.enter("inference")
        answers, seconds = timed(run, repeat, journal, self.runtime.ranks)
        return Answers(answers, workload, seconds)

    def _stop_tokens(self) -> frozenset[int]:
        """Where answers end. Raises UserError: see `stop_tokens`."""
        name, model = self.runtime.name, self.runtime.weights.model
        own = None if model is None else model.generation_config
        return stop_tokens(name, own or load_generation_config(name, self.runtime.config))

    def _one_by_one(
        self, questions: Sequence[ChatQuestion], clock: Clock, progress: Progress
    ) -> Callable[[Journal | None], list[Answer]]:
        """Loads the stock model; returns what asks the pipeline one question after another."""
        clock.enter("load_model")
        model, runtime = self.runtime.load(), self.runtime
        stock = StockPipeline(model, self.tokenizer)

        def run(journal: Journal | None) -> list[Answer]:
            conversations = [question.conversation for question in questions]
            with stock_attention(model, runtime.weights.stock_attention):
                texts = answer_alone(stock, conversations, self.new_tokens, progress, journal, runtime.ranks)
            return [Answer(text) for text in texts]

        return run

    def _packed(
        self, questions: Sequence[ChatQuestion], workload: Workload, clock: Clock, progress: Progress
    ) -> tuple[Callable[[Journal | None], list[Answer]], Workload]:
        """Loads and warms up; returns what runs the passes and reads the answers, and the workload in the end."""
        warmed, staged, workload = self.warm(workload, clock, progress)
        model, sequences = self.runtime.load(), workload.sequences
        stop = self._stop_tokens()
        stock = StockPipeline(model, self.tokenizer)
        prompts, ranks = prompts_of(sequences), self.runtime.ranks
        lanes = 1 if warmed.decoder is None else warmed.decoder.shape.lanes

        def named(sequence: int) -> str:
            return f"question '{questions[sequences.questions[sequence]].id}'"

        def write(begun: Sequence[Ints], room: Sequence[int], done: Callable[[int, list[int]], None]) -> None:
            if warmed.decoder is not None:
                decode(warmed.decoder, begun, room, stop, done)
                return
            with stock_attention(model, self.runtime.weights.stock_attention):
                for i, (one, most) in enumerate(zip(begun, room, strict=True)):
                    done(i, stock.continued(one.tolist(), most))

        def run(journal: Journal | None) -> list[Answer]:
            readouts = run_passes(warmed.engine, staged, progress, named, journal, ranks)
            walks = walk(sequences, most_likely(staged, readouts), stop, self.new_tokens)
            left = {
                i: (np.array([*prompts[i], *one.tokens], dtype=np.int32), self.new_tokens - len(one.tokens))
                for i, one in enumerate(walks)
                if not one.complete
            }
            outside = write_answers(left, write, progress, journal, ranks, lanes)
            return [_answer(stock, prompts[i], one, outside.get(i, [])) for i, one in enumerate(walks)]

        return run, workload


def most_likely(staged: Sequence[StagedPass], readouts: Sequence[Readouts]) -> Ints:
    """For every predicted token of every sequence, in order, the most likely one there."""
    sequence = np.concatenate([one.choice for one in staged])
    argmax = np.concatenate([out.argmax for out in readouts])
    ordered: Ints = argmax[np.argsort(sequence, kind="stable")]
    return ordered


def decode(
    decoder: Decoder,
    begun: Sequence[Ints],
    room: Sequence[int],
    stop: frozenset[int],
    done: Callable[[int, list[int]], None] = lambda *_: None,
) -> list[list[int]]:
    """The tokens that greedy decoding writes after each of these token sequences.

    Args:
        decoder: warm.
        begun: at least one token each.
        room: the most tokens to write after each.
        stop: tokens that end an answer.
        done: called with each row that is done, and what was written.
    """
    lanes = DecodeSchedule(begun, room, stop, decoder.shape)
    decoder.clear()
    while (step := lanes.next()) is not None:
        _, argmax = decoder.run(step)
        for row in lanes.take(argmax):
            done(row, lanes.written[row])
    return lanes.written


def _answer(stock: StockPipeline, prompt: Ints, begun: Walk, outside: list[int]) -> Answer:
    tokens = begun.tokens + outside
    return Answer(stock.text(prompt.tolist(), tokens), tuple(tokens), len(outside))
