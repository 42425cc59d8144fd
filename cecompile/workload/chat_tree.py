"""Chat questions as token trees: choices are grafted onto the prompt, and a walk down the tree reads the answer.

Greedy decoding takes the most likely token again and again. A pass over the tree gives the most likely token after
every node. So following these tokens from the prompt's last token is greedy decoding, as long as the tokens are nodes.
The grafted choices decide how far the walk goes, never where the walk leads.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cecompile.errors import UserError, first_line
from cecompile.interrupt import at_most
from cecompile.tasks.chat import ChatQuestion
from cecompile.workload.encode import tokenize
from cecompile.workload.sequences import Ints, Sequences

RENDERING = 10.0  # seconds for one question's chat template, which takes a millisecond


@dataclass(frozen=True, slots=True)
class Walk:
    """The most likely `tokens` of an answer as far as the tree has nodes; `complete` if the answer ends there."""

    tokens: list[int]
    complete: bool


def graft(questions: Sequence[ChatQuestion], tokenizer: Any, max_length: int, new_tokens: int) -> Sequences:
    """Token sequences of every question: the prompt with each form of each choice, or alone without choices.

    The prompt is rendered by the tokenizer's chat template, as in `transformers`' text-generation pipeline: a last
    message of the assistant's is continued; after any other, an answer begins. A choice has up to three forms: its
    tokens right after the prompt, with and without a space, and the tokens of its text alone. One more token to
    predict follows each form, where the answer may end.

    Args:
        questions: at least one.
        max_length: the most tokens that the model reads. Longer sequences are left out.
        new_tokens: the most tokens an answer may have; longer choices are cut.

    Raises:
        UserError: there is no chat template, or the template fails for a question or takes RENDERING
            seconds; a prompt exceeds `max_length`.
    """
    texts = [_render(question, tokenizer) for question in questions]
    prompts = tokenize(tokenizer, texts, add_special_tokens=False)
    for question, prompt in zip(questions, prompts, strict=True):
        if not prompt and tokenizer.bos_token_id is not None:
            prompt.append(tokenizer.bos_token_id)  # with which `generate` begins from an empty prompt
        if not prompt or len(prompt) > max_length:
            raise UserError(f"question '{question.id}': a prompt of {len(prompt)} tokens, the model reads {max_length}")
    ending = tokenizer.eos_token_id or 0  # any token would do: only the most likely one is read
    rows: list[tuple[list[int], int, int]] = []  # (tokens, how many are predicted, question)
    for number, (prompt, forms) in enumerate(zip(prompts, _forms(questions, texts, prompts, tokenizer), strict=True)):
        cut = {form[:new_tokens] for form in forms}
        fitting = sorted(form for form in cut if len(prompt) + len(form) <= max_length) or [()]
        rows += [([*prompt, *form, ending], len(form) + 1, number) for form in fitting]
    return Sequences.of(*zip(*rows, strict=True))


def prompts_of(sequences: Sequences) -> list[Ints]:
    """Each question's prompt, from the sequences of `graft`."""
    first = np.searchsorted(sequences.questions, np.arange(sequences.questions[-1] + 1))
    ends = sequences.starts[1:] - sequences.predicted
    return [sequences.token_ids[sequences.starts[i] : ends[i]] for i in first.tolist()]


def walk(sequences: Sequences, argmax: Ints, stop: frozenset[int], new_tokens: int) -> list[Walk]:
    """Each question's answer as far as its tree holds the answer's tokens. Tokens in `stop` end an answer.

    Args:
        argmax: (predictions,) the most likely token for every predicted token of every sequence, in order.
        new_tokens: the most tokens an answer may have; at least 1.
    """
    likely_in = np.split(argmax, np.cumsum(sequences.predicted)[:-1])
    bounds = np.searchsorted(sequences.questions, np.arange(int(sequences.questions[-1]) + 2))
    out = []
    for first, last in itertools.pairwise(bounds.tolist()):
        here = [(sequences.targets(i).tolist()[:-1], likely_in[i].tolist()) for i in range(first, last)]
        tokens: list[int] = []
        while here and len(tokens) < new_tokens and not (tokens and tokens[-1] in stop):
            at = len(tokens)
            tokens.append(here[0][1][at])
            here = [(form, likely) for form, likely in here if len(form) > at and form[at] == tokens[at]]
        out.append(Walk(tokens, tokens[-1] in stop or len(tokens) == new_tokens))
    return out


def _render(question: ChatQuestion, tokenizer: Any) -> str:
    """A question's prompt, by the tokenizer's chat template."""
    continued = question.messages[-1][0] == "assistant"
    options = {"tokenize": False, "add_generation_prompt": not continued, "continue_final_message": continued}
    try:
        with at_most(RENDERING):
            return str(tokenizer.apply_chat_template(question.conversation, **options))
    except Exception as error:  # the template is a program of the checkpoint's
        raise UserError(f"question '{question.id}': chat template: {first_line(error)}") from None


def _forms(
    questions: Sequence[ChatQuestion], texts: Sequence[str], prompts: Sequence[list[int]], tokenizer: Any
) -> list[set[tuple[int, ...]]]:
    """The token forms of each question's choices. Each distinct text is tokenised once."""
    marks = sorted(tokenizer.get_added_vocab())
    tails = [text[max([0, *(text.rfind(mark) for mark in marks)]) :] for text in texts]
    known = _ids(tokenizer, tails)
    for number, (tail, prompt) in enumerate(zip(tails, prompts, strict=True)):
        if prompt[len(prompt) - len(known[tail]) :] != known[tail]:  # the tail alone is tokenised differently
            tails[number] = texts[number]
            known[texts[number]] = prompt
    pairs = list(zip(questions, tails, strict=True))
    ids = _ids(tokenizer, (t for q, tail in pairs for c in q.choices for t in (tail + c, f"{tail} {c}", c)))
    out = []
    for question, tail in pairs:
        head = known[tail]
        wholes = [ids[text] for choice in question.choices for text in (tail + choice, f"{tail} {choice}")]
        after_prompt = {tuple(whole[len(head) :]) for whole in wholes if whole[: len(head)] == head}
        out.append((after_prompt | {tuple(ids[choice]) for choice in question.choices}) - {()})
    return out


def _ids(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """The token ids of each distinct text."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, tokenize(tokenizer, distinct, add_special_tokens=False), strict=True))
