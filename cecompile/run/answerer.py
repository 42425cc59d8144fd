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
from cecompile.run.context import RunContext
from cecompile.run.language_model import LanguageModel, Workload, timed
from cecompile.run.passes import Begun, answer_alone, run_passes, write_answers
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
        text: the text that `transformers`' text-generation pipeline returns.
        token_ids: the tokens that the model wrote, the end token included; None where the pipeline itself ran.
        decoded_tokens: the number of tokens decoded outside the tree; None where the pipeline itself ran.
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


Inference = Callable[[RunContext, Begun | None], list[Answer]]


class Answerer(LanguageModel):
    """Answers chat questions with one model. Made by `from_pretrained`; weights are loaded by the first `answer`.

    Args:
        new_tokens: the most tokens of an answer; None is the usual number.
    """

    def __init__(self, runtime: Runtime, tokenizer: object, new_tokens: int | None = None) -> None:
        new_tokens = NEW_TOKENS if new_tokens is None else new_tokens
        if new_tokens < 1:
            raise UserError(f"new tokens: {new_tokens} is too few, at least 1")
        if runtime.planner.sizing.options.pipeline > 1:
            raise UserError("--pipeline: chat answers need all layers on one device; leave out --pipeline")
        super().__init__(runtime, tokenizer, new_tokens)

    def prepare(self, questions: Sequence[ChatQuestion], *, fit: bool = False) -> Workload:
        """See `LanguageModel.prepare`."""
        runtime = self.runtime
        if runtime.mode.engine != "reference":
            self._stop_tokens()
        longest = max_input_length(runtime.config, self.tokenizer)
        sequences = graft(questions, self.tokenizer, longest, self.new_tokens)
        return self.workload(sequences, fit)

    def answer(self, questions: Sequence[ChatQuestion], run: RunContext | None = None) -> Answers:
        """Returns greedy decoding's answer to every question; args, raises: see `Scorer.score`."""
        run = self.in_context(run)
        run.clock.enter("preprocess")
        workload, begun = self.prepare(questions, fit=True), None
        if workload.plan is None:
            infer = self._one_by_one(questions, run)
        else:
            infer, workload, begun = self._packed(questions, workload, run)
        begin(self.runtime, workload, run.journal, self.new_tokens)
        run.clock.enter("inference")
        answers, seconds = timed(infer, run, begun)
        return Answers(answers, workload, seconds)

    def _stop_tokens(self) -> frozenset[int]:
        """Returns the tokens that end an answer; raises: see `stop_tokens`."""
        name, model = self.runtime.name, self.runtime.weights.model
        own = None if model is None else model.generation_config
        return stop_tokens(name, own or load_generation_config(name, self.runtime.config))

    def _one_by_one(self, questions: Sequence[ChatQuestion], run: RunContext) -> Inference:
        """Loads the stock model; returns a function that asks the pipeline one question after another."""
        run.clock.enter("load_model")
        model, runtime = self.runtime.load(), self.runtime
        stock = StockPipeline(model, self.tokenizer)

        def alone(run: RunContext, _: Begun | None) -> list[Answer]:
            conversations = [question.conversation for question in questions]
            with stock_attention(model, runtime.weights.stock_attention):
                texts = answer_alone(stock, conversations, self.new_tokens, run)
            return [Answer(text) for text in texts]

        return alone

    def _packed(
        self, questions: Sequence[ChatQuestion], workload: Workload, run: RunContext
    ) -> tuple[Inference, Workload, Begun | None]:
        """Loads and warms up; returns a function that runs the passes and reads the answers, the final workload, and
        what has begun."""
        warm = self.warm(workload, run)
        warmed, staged, workload = warm.warmed, warm.staged, warm.workload
        model, sequences = self.runtime.load(), workload.sequences
        stop = self._stop_tokens()
        stock = StockPipeline(model, self.tokenizer)
        prompts = prompts_of(sequences)
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

        def packed(run: RunContext, begun: Begun | None) -> list[Answer]:
            readouts = run_passes(warmed.engine, staged, named, run, begun)
            walks = walk(sequences, most_likely(staged, readouts), stop, self.new_tokens)
            left = {
                i: (np.array([*prompts[i], *one.tokens], dtype=np.int32), self.new_tokens - len(one.tokens))
                for i, one in enumerate(walks)
                if not one.complete
            }
            outside = write_answers(left, write, run, lanes)
            return [_answer(stock, prompts[i], one, outside.get(i, [])) for i, one in enumerate(walks)]

        return packed, workload, warm.begun


def most_likely(staged: Sequence[StagedPass], readouts: Sequence[Readouts]) -> Ints:
    """Returns the most likely token at each predicted position of every sequence, in order."""
    sequence = np.concatenate([one.choice for one in staged])
    argmax = np.concatenate([out.argmax for out in readouts])
    ordered: Ints = argmax[np.argsort(sequence, kind="stable")]
    return ordered


def decode(
    decoder: Decoder, begun: Sequence[Ints], room: Sequence[int], stop: frozenset[int],
    done: Callable[[int, list[int]], None] = lambda *_: None,
) -> list[list[int]]:  # fmt: skip
    """Returns the tokens that greedy decoding writes after each of these token sequences.

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
