"""Questions to token ids, exactly as lm-evaluation-harness encodes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cecompile.errors import UserError
from cecompile.tasks.question import Question
from cecompile.workload.sequences import Sequences


@dataclass(frozen=True, slots=True)
class Encoded:
    """The questions' token sequences in order, and how many questions lost tokens at their left end."""

    sequences: Sequences
    truncated_questions: int


def encode(questions: Sequence[Question], tokenizer: Any, max_length: int) -> Encoded:
    """Token sequences of every choice of every question.

    The rules are `_encode_pair` and `loglikelihood` of lm-evaluation-harness 0.4.13: white space at the end of a
    context moves to the choices; a choice's tokens are those of (context + choice) after as many as the context alone
    has; an empty context becomes the BOS token, else EOS; the tokenizer's default special tokens are added unless the
    text already begins with BOS; what exceeds `max_length` inputs is cut off on the left.

    Args:
        questions: any number of questions.
        tokenizer: a `transformers` tokenizer.
        max_length: the most tokens the model can read.

    Raises:
        UserError: a choice has no tokens of its own or more than `max_length`, or the tokenizer has neither BOS nor
            EOS where an empty context needs one.
    """
    encoder = _Encoder(tokenizer)
    contexts, choices = zip(*(_split(q) for q in questions), strict=True)
    context_ids = encoder.texts(contexts)
    whole = encoder.texts([c + choice for c, many in zip(contexts, choices, strict=True) if c for choice in many])
    alone = encoder.texts(
        [ch for c, many in zip(contexts, choices, strict=True) if not c for ch in many], special=False
    )
    whole_ids, alone_ids = iter(whole), iter(alone)

    flat: list[list[int]] = []
    predicted, owners = [], []
    truncated = 0
    for q, question in enumerate(questions):
        cut = False
        for number in range(len(choices[q])):
            if contexts[q]:
                head = context_ids[q]
                tail = next(whole_ids)[len(head) :]
                head = head or [encoder.prefix_token(question)]
            else:
                head, tail = [encoder.prefix_token(question)], next(alone_ids)
                if tail and tail[0] == head[0]:
                    tail = tail[1:]
            if not 0 < len(tail) <= max_length:
                what = "no tokens of its own" if not tail else f"{len(tail)} tokens, the model reads {max_length}"
                raise UserError(f"question '{question.id}': choice {number}: {what}")
            tokens = (head + tail)[-(max_length + 1) :]
            cut |= len(head) + len(tail) > max_length + 1
            flat.append(tokens)
            predicted.append(len(tail))
            owners.append(q)
        truncated += cut
    return Encoded(Sequences.of(flat, predicted, owners), truncated)


def max_input_length(config: Any, tokenizer: Any) -> int:
    """The most tokens a model reads, from its configuration, else from its tokenizer, else 2,048 (lm-eval's order)."""
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    value = getattr(tokenizer, "model_max_length", None)
    return int(value) if value is not None and value < 10**18 else 2048


def _split(question: Question) -> tuple[str, list[str]]:
    """Context and continuations, with white space at the context's end moved to the continuations."""
    context = question.context.rstrip()
    moved = question.context[len(context) :] + question.delimiter
    return context, [moved + choice for choice in question.choices]


class _Encoder:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._prefix: int | None = prefix
        self._bos_text: str | None = tokenizer.decode(prefix) if prefix is not None else None

    def texts(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Token ids of each text. Special tokens: `special`, else the tokenizer's default unless BOS is written out."""
        out: list[list[int]] = [[] for _ in texts]
        plain = [i for i, t in enumerate(texts) if self._bos_text is not None and t.startswith(self._bos_text)]
        marked = set(plain)
        for chosen, extra in (
            ([i for i in range(len(texts)) if i not in marked], {}),
            (plain, {"add_special_tokens": False}),
        ):
            if special is not None:
                extra = {"add_special_tokens": special}
            if chosen:
                batch = self._tokenizer([texts[i] for i in chosen], return_attention_mask=False, verbose=False, **extra)
                for i, ids in zip(chosen, batch["input_ids"], strict=True):
                    out[i] = ids
        return out

    def prefix_token(self, question: Question) -> int:
        if self._prefix is None:
            raise UserError(f"question '{question.id}': empty context, and the tokenizer has neither BOS nor EOS")
        return self._prefix
