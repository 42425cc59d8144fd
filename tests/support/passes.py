"""Random sequences, a warm engine and its staged passes, and the stock model's greedy tokens."""

import numpy as np
import torch
from transformers import pipeline

from cecompile.engine.forward import Engine
from cecompile.engine.reference import score_one_by_one
from cecompile.model.support import boundary_of
from cecompile.run.scorer import collect
from cecompile.workload.plan import choose_geometry, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import stage_all
from support.models import VOCABULARY


def random_sequences(seed: int = 0, questions: int = 12, trunk: int = 0) -> Sequences:
    """Questions of four choices, every other one with a shared start; contexts `trunk` tokens longer."""
    random = np.random.default_rng(seed)
    parts, readouts, owners = [], [], []
    shared = random.integers(3, VOCABULARY, 12)
    for q in range(questions):
        own = random.integers(3, VOCABULARY, trunk + random.integers(1, 40))
        context = np.concatenate([shared[: 12 * (q % 2)], own])
        for _ in range(4):
            choice = random.integers(3, VOCABULARY, random.integers(1, 20))
            parts.append(np.concatenate([context, choice]))
            readouts.append(len(choice))
            owners.append(q)
    return Sequences.of(parts, readouts, owners)


def prepared(model, sequences, attention, *, compiled, tokens=512):
    """A warm engine and the staged passes."""
    geometry = choose_geometry(
        int(sequences.input_lengths.max()), tokens_per_bucket=tokens, blocks=attention == "flex", readout_chunk=64
    )
    plan = make_plan(sequences, geometry, boundary=boundary_of(model.config))
    engine = Engine(model, plan.buckets, attention=attention, compiled=compiled, readout_chunk=64)
    engine.warm_up()
    return engine, list(stage_all(plan))


def score(model, sequences, attention, *, compiled=False, tokens=512):
    """Loglikelihoods and greedy flags of the sequences."""
    engine, staged = prepared(model, sequences, attention, compiled=compiled, tokens=tokens)
    return collect(len(sequences), staged, engine.run(staged))


def assert_scored_as_stock(model, sequences, attention, **how) -> None:
    """Checks loglikelihoods and greedy flags against the stock model's, one sequence at a time."""
    expected, expected_greedy = score_one_by_one(model, sequences)
    got, greedy = score(model, sequences, attention, **how)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)
    assert (greedy == expected_greedy).all()


def generated(model, prompt, new_tokens, stop):
    ids = torch.from_numpy(prompt).long()[None].to(model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def stock_texts(model, questions, new_tokens):
    """Returns the official loop's answers: one conversation after another goes through the pipeline."""
    pipe = pipeline("text-generation", model=str(model), tokenizer=str(model), device="cpu", dtype=torch.float32)
    options = {"max_new_tokens": new_tokens, "return_full_text": False, "do_sample": False}
    chats = [[{"role": role, "content": content} for role, content in q.messages] for q in questions]
    return [pipe(chat, **options)[0]["generated_text"] for chat in chats]
