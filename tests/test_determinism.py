"""Results that are equal bit for bit, and others within rounding: runs, new engines, resumed runs, bucket sizes, order.

Bitwise: the same questions in the same order, with the same options, on the same device with the same number of
threads and the same versions, whatever was interrupted. Within rounding: other bucket sizes, a part of the questions,
another order of them: a question then shares its pass with others, and sums are taken in another order. That a cold and
a warm compile cache give the same bit for bit is in test_cache.py.
"""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.rows import CHATS, ROWS, write_rows
from support.runs import Runs

from cecompile import Scorer, read_questions

ROUNDING = 1e-4  # in a loglikelihood, float32


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return read_questions(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


def scores(model: Path, questions, **how) -> dict[str, tuple[float, ...]]:
    """Loglikelihoods by id, of a scorer made anew."""
    scorer = Scorer.from_pretrained(model, device="cpu", **({"engine": "eager", "tokens_per_bucket": 256} | how))
    return dict(zip([q.id for q in questions], scorer.score(questions).loglikelihoods, strict=True))


@pytest.fixture(scope="module")
def expected(questions, tiny_llama):
    return scores(tiny_llama, questions)


@pytest.mark.parametrize(("engine", "count"), [("eager", 40), ("reference", 5)])
def test_again_bitwise(engine, count, questions, tiny_llama):
    first, again = (scores(tiny_llama, questions[:count], engine=engine) for _ in range(2))
    assert first == again


@pytest.mark.process
def test_in_another_process_bitwise(questions, tiny_llama, expected, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    code = (
        "import json, sys, torch; from cecompile import Scorer, read_questions;"
        "torch.set_num_threads(int(sys.argv[3]));"
        "s = Scorer.from_pretrained(sys.argv[1], device='cpu', engine='eager', tokens_per_bucket=256);"
        "print(json.dumps(s.score(read_questions(sys.argv[2])).loglikelihoods))"
    )
    command = [sys.executable, "-c", code, str(tiny_llama), str(data), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [tuple(one) for one in json.loads(done.stdout)] == list(expected.values())


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["scored", "answered"])
def test_from_points_of_resumption_bitwise(rows, tiny_llama, tmp_path):
    run = Runs(tmp_path, tiny_llama, rows, "--engine", "eager", "--tokens-per-bucket", "128", "--max-new-tokens", 2)
    assert run("whole").exit_code == 0
    runs = sum(bucket["runs"] for bucket in run.results("whole")["plan"]["buckets"])
    assert runs >= 2
    for point in {1, runs // 2, runs - 1}:
        name = f"after {point}"
        assert run.stopped(name, point, number=signal.SIGTERM).exit_code == 143
        assert run(name, "--resume").exit_code == 0
        assert run.results(name)["resumed"]["passes"] == point
        assert run.samples(name) == run.samples("whole")


@pytest.mark.parametrize(
    ("count", "seed", "tokens"),
    [
        (40, None, 128),
        (40, None, 512),
        (40, None, 4096),
        (1, None, 256),
        (13, None, 256),
        (39, None, 256),
        (40, 0, 256),
    ],
)
def test_any_bucket_size_limit_and_order_within_rounding(count, seed, tokens, questions, tiny_llama, expected):
    chosen = questions[:count] if seed is None else random.Random(seed).sample(questions, count)
    for id, values in scores(tiny_llama, chosen, tokens_per_bucket=tokens).items():
        np.testing.assert_allclose(values, expected[id], rtol=0, atol=ROUNDING)
        assert int(np.argmax(values)) == int(np.argmax(expected[id]))
