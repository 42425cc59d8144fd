"""A backend for lm-evaluation-harness: its tasks, prompts, tokens and metrics, our scoring.

Everything but the scoring of (context, continuation) pairs is lm_eval's own Hugging Face backend. All pairs of a run
are scored at once, as trees: continuations of one context share it, and contexts share what they begin with, few-shot
examples above all.
"""

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from cecompile.device import parse_size
from cecompile.engine.attention import stock_attention
from cecompile.errors import UserError
from cecompile.run.scorer import Scorer
from cecompile.workload.sequences import Sequences

Pair = tuple[Any, list[int], list[int]]  # what was asked for, the context's tokens, the continuation's
OWN_OPTIONS = ("engine", "attention", "tokens_per_bucket", "memory_limit", "cache_dir", "require_warm")


@register_model("cecompile")
class CecompileLM(HFLM):
    """lm_eval's `hf` backend with loglikelihoods by packed token trees.

    Args:
        engine, attention, tokens_per_bucket, cache_dir, require_warm: see `RunOptions`.
        memory_limit: bytes, or a text such as "28GB".
        others, more: the arguments of `hf`: pretrained, dtype, device, max_length, add_bos_token ...

    Raises:
        UserError: such an option is wrong, or the model cannot be scored as trees.
    """

    def __init__(self, *others: Any, **more: Any) -> None:
        own = {name: more.pop(name) for name in OWN_OPTIONS if name in more}
        super().__init__(*others, **more)
        if self.backend != "causal" or self.world_size > 1:
            raise UserError("cecompile scores decoder-only models in one process; --model hf does the rest")
        limit = own.get("memory_limit")
        if isinstance(limit, str):
            try:
                own["memory_limit"] = parse_size(limit)
            except ValueError:
                raise UserError(f"memory_limit '{limit}': give bytes, or a number with a unit such as GB") from None
        model, name = self.model.eval().requires_grad_(False), str(self.config.name_or_path or "model")
        self._scorer = Scorer.from_model(model, self.tokenizer, name=name, **own)
        self._requests: Sequence[Any] = []  # lm_eval's own form of those under way

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns `hf`'s results; a request that cannot be scored is named by its task and document."""
        for request in requests:
            if not request.args[1]:
                raise UserError(f"{_named(request)}: an empty continuation; {_LOOK}")
        self._requests = requests
        try:
            values: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        finally:
            self._requests = []
        return values

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Returns (loglikelihood, whether greedy decoding gives the continuation) per request, in order."""
        if not requests:
            return []
        sequences, order = as_sequences(requests, self.max_length, [_named(one) for one in self._requests])
        loglikelihood, greedy = self._scorer.score_sequences(sequences)
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for place, number in enumerate(order):
            out[number] = float(loglikelihood[place]), bool(greedy[place])
        for (asked, _, _), answer in zip(requests, out, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return out

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the summed log-probability of each text. All windows of all texts are scored at once."""
        size = self.batch_size_per_gpu  # type: ignore[has-type]
        self.batch_size_per_gpu = sys.maxsize
        try:
            values: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = size
        return values

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generates text by `hf`'s own method, with the stock model."""
        with stock_attention(self.model, self._scorer.runtime.weights.stock_attention):
            texts: list[str] = super().generate_until(requests, disable_tqdm)
        return texts


_LOOK = "look at the task's doc_to_choice and doc_to_target"


def _named(request: Any) -> str:
    """A request of lm_eval by its task and the number of its document, where lm_eval gives both."""
    return f"task '{request.task_name or 'unnamed'}', document {'?' if request.doc_id is None else request.doc_id}"


def as_sequences(
    requests: Sequence[Pair], max_length: int, names: Sequence[str] = ()
) -> tuple[Sequences, list[int]]:  # fmt: skip
    """Returns the requests as token sequences; requests with the same context are neighbours.

    Args:
        requests: at least one; neither part of a pair is empty.
        max_length: the most tokens the model reads. What exceeds it is cut off on the left, as `hf` does.
        names: the requests' names for messages; empty where the requests have none, as windows of a long text.

    Returns:
        n sequences, and the request that each is for.

    Raises:
        UserError: a continuation is empty, or longer than the model can read.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (asked, context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= max_length:
            fault = f"a continuation of {len(continuation)} tokens; the model reads {max_length}"
            if not continuation:
                fault = f"continuation {(asked or ('', ''))[1]!r} adds no token to its context; {_LOOK}"
            raise UserError(f"{names[number] if names else f'request {number}'}: {fault}")
        groups.setdefault(tuple(context), []).append(number)
    order = [number for group in groups.values() for number in group]
    tokens = [(requests[n][1] + requests[n][2])[-(max_length + 1) :] for n in order]
    owners = [owner for owner, group in enumerate(groups.values()) for _ in group]
    return Sequences.of(tokens, [len(requests[n][2]) for n in order], owners), order


def run_command_line(arguments: Sequence[str]) -> None:
    """Runs lm_eval's own command line, with this backend registered."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
