"""Questions to token ids, exactly as lm-evaluation-harness encodes them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from cecompile.errors import UserError
from cecompile.tasks.question import Question
from cecompile.workload.sequences import Ints, Longs, Sequences, stretched

AT_ONCE = 2048  # questions that are encoded together; bounds the memory taken besides the result


@dataclass(frozen=True, slots=True)
class Encoded:
    """The questions' token sequences in order, and the number of questions that lost tokens at their left end."""

    sequences: Sequences
    truncated_questions: int


def encode(questions: Sequence[Question], tokenizer: Any, max_length: int) -> Encoded:
    """Token sequences of every choice of every question.

    The rules are `_encode_pair` and `loglikelihood` of lm-evaluation-harness 0.4.13. White space at the end of a
    context moves to the choices. A choice's tokens are those of (context + choice) past the number of tokens that the
    context alone has. An empty context becomes the BOS token, else EOS. The tokenizer's default special tokens are
    added unless the text already begins with BOS. Inputs longer than `max_length` are cut on the left.

    Raises:
        UserError: a choice has no tokens of its own or more than `max_length`, or the tokenizer has neither BOS nor
            EOS where an empty context needs one.
    """
    encoder = _Encoder(tokenizer)
    begins = range(0, len(questions), AT_ONCE)
    parts = [_encode_part(questions[at : at + AT_ONCE], at, encoder, max_length) for at in begins]
    return Encoded(Sequences.joined([one.sequences for one in parts]), sum(one.truncated_questions for one in parts))


def _encode_part(questions: Sequence[Question], first: int, encoder: "_Encoder", max_length: int) -> Encoded:
    """Encodes questions that are numbered from `first`."""
    parts = [part for q in questions for part in _parts(q)]  # (context, choices that continue the context)
    contexts = [context.rstrip() for context, _, _ in parts]
    before = [full[len(c) :] + delimiter for (full, _, delimiter), c in zip(parts, contexts, strict=True)]
    choices = [[moved + choice for choice in many] for (_, many, _), moved in zip(parts, before, strict=True)]
    context = encoder.texts(contexts)
    whole = encoder.texts([c + choice for c, many in zip(contexts, choices, strict=True) if c for choice in many])
    bare_choices = [choice for c, many in zip(contexts, choices, strict=True) if not c for choice in many]
    alone = encoder.texts(bare_choices, special=False)
    of = np.repeat(np.arange(len(parts)), [len(many) for many in choices])  # for each sequence: its context
    owners = np.repeat(np.arange(len(questions)), [len(q.choices) for q in questions])
    written = np.array([bool(c) for c in contexts])[of]  # for each sequence: whether it has a context

    # Heads and tails as stretches of one array: contexts, then contexts with choices, choices alone, the prefix token.
    pool = np.concatenate((context.ids, whole.ids, alone.ids, [encoder.prefix or 0])).astype(np.int32)
    at_whole, at_alone, at_prefix = np.cumsum([len(context.ids), len(whole.ids), len(alone.ids)])
    head, head_size = context.starts[of], context.sizes[of]
    tail, tail_size = np.empty_like(head), np.empty_like(head)
    tail[written], tail_size[written] = at_whole + whole.starts, whole.sizes
    tail[~written], tail_size[~written] = at_alone + alone.starts, alone.sizes
    given = np.where(written, head_size, (tail_size > 0) & (pool[tail] == pool[-1]))  # tokens that are the head's
    tail, tail_size = tail + given, tail_size - given
    bare = ~written | (head_size == 0)
    head, head_size = np.where(bare, at_prefix, head), np.where(bare, 1, head_size)

    wrong = (tail_size <= 0) | (tail_size > max_length) | (bare if encoder.prefix is None else False)
    if wrong.any():
        i = int(wrong.argmax())
        question = questions[owners[i]]
        if bare[i] and encoder.prefix is None:
            raise UserError(f"question '{question.id}': empty context, and the tokenizer has neither BOS nor EOS")
        size, number = int(tail_size[i]), i - int(np.searchsorted(owners, owners[i]))
        what = "no tokens of its own" if size <= 0 else f"{size} tokens, the model reads {max_length}"
        raise UserError(f"question '{question.id}': choice {number}: {what}")
    excess = np.maximum(0, head_size + tail_size - (max_length + 1))
    stretches = np.stack((head + excess, tail), axis=1).ravel()
    sizes = np.stack((head_size - excess, tail_size), axis=1).ravel()
    starts = np.concatenate(([0], np.cumsum(sizes)[1::2])).astype(np.int64)
    predicted, numbers = tail_size.astype(np.int32), (first + owners).astype(np.int32)
    sequences = Sequences(pool[stretched(stretches, sizes)], starts, predicted, numbers)
    return Encoded(sequences, len(np.unique(owners[excess > 0])))


def _parts(question: Question) -> Iterator[tuple[str, Sequence[str], str]]:
    """Every context of a question, the choices that continue the context, and the delimiter in between."""
    if not question.contexts:
        yield question.context, question.choices, question.delimiter
    for context, choice in zip(question.contexts, question.choices if question.contexts else (), strict=True):
        yield context, (choice,), question.delimiter


def max_input_length(config: Any, tokenizer: Any) -> int:
    """The most tokens a model reads, from its configuration, else from its tokenizer, else 2,048 (lm-eval's order)."""
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    value = getattr(tokenizer, "model_max_length", None)
    return int(value) if value is not None and value < 10**18 else 2048


class _Tokens(NamedTuple):
    """The token ids of texts, one text after another, and each text's first index and number of tokens."""

    ids: Ints
    starts: Longs
    sizes: Longs


class _Encoder:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, kind, fast = tokenizer, type(tokenizer), PreTrainedTokenizerFast
        # whether the tokenizer is only transformers' own code around a compiled tokenizer of `tokenizers`
        self._is_shell = isinstance(tokenizer, fast) and kind.__call__ is fast.__call__
        self._is_shell &= getattr(kind, "_encode_plus", None) is getattr(fast, "_encode_plus", kind)
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.prefix: int | None = prefix  # stands for an empty context
        self._bos_text: str | None = tokenizer.decode(prefix) if prefix is not None else None

    def texts(self, texts: Sequence[str], special: bool = True) -> _Tokens:
        """Token ids of each text. `special` adds the default special tokens to texts that do not begin with BOS."""
        out: list[list[int]] = [[] for _ in texts]
        plain = [not special or (self._bos_text is not None and t.startswith(self._bos_text)) for t in texts]
        for is_plain, extra in ((False, {}), (True, {"add_special_tokens": False})):
            chosen = [i for i in range(len(texts)) if plain[i] == is_plain]
            for i, ids in zip(chosen, self._ids([texts[i] for i in chosen], extra), strict=True):
                out[i] = ids
        sizes = np.array([len(ids) for ids in out], dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(out), np.int32, int(sizes.sum()))
        return _Tokens(flat, np.cumsum(sizes) - sizes, sizes)

    def _ids(self, texts: list[str], extra: dict[str, bool]) -> list[list[int]]:
        """The tokenizer's ids. Skips a thin shell around a compiled tokenizer, for speed."""
        if not texts or not self._is_shell:
            return tokenize(self._tokenizer, texts, **extra)
        tokenize(self._tokenizer, texts[:1], **extra)  # turns truncation and padding off in the compiled tokenizer
        compiled = self._tokenizer.backend_tokenizer
        return [one.ids for one in compiled.encode_batch_fast(texts, **({"add_special_tokens": True} | extra))]


def tokenize(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    """The token ids of each text."""
    batch = tokenizer(texts, return_attention_mask=False, verbose=False, **options) if texts else {"input_ids": []}
    return list(batch["input_ids"])
