"""Synthetic questions by the million: seconds and memory of reading, encoding, planning and staging, then of scoring.

    python scripts/bench_windows.py --rows 1000000 --score 50000

Writes --rows multiple-choice questions in the form query/choices/gold: an instruction that all share, a sentence or
two, four short choices. Each phase's wall seconds, processor seconds (of all threads) and the resident memory's peak so
far are printed. With --score N the first N are scored on the CPU by a two-layer model with random weights; seconds for
all rows are then extrapolated, and so labelled.
"""

import argparse
import json
import random
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cecompile import Scorer, demo, evaluate
from cecompile.results.clock import Clock
from cecompile.results.journal import Journal
from cecompile.tasks.read import read_windows
from cecompile.tasks.windows import WINDOW, Windows
from cecompile.workload.encode import encode, max_input_length
from cecompile.workload.stage import stage_all
from cecompile.workload.totals import Totals

INSTRUCTION = "Choose the right ending."
PEOPLE = ("Emil", "Nina", "Piet", "Karl", "Mara", "Finn", "Hugo", "Olga", "Ida", "Ben")
PLACES = ("at the gate", "in the hall", "in the kitchen", "on the wall", "at the fair", "in the street")
THINGS = ("a rake", "a drum", "a doll", "a ball", "a flute", "a kite", "the boat", "a card", "a bucket", "fresh bread")
ACTS = ("has", "has brought", "looks for", "takes", "puts down", "trades", "finds")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
GOODS = ("plums", "eggs", "cards", "bones", "worms", "onions", "parcels")
ENDINGS = ("the flute", "two eggs", "three plums", "the kite", "the ball", "a doll", "ten bones", "the rake", "a card")


def rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """So many questions, the same for the same seed."""
    draw = random.Random(seed)
    for number in range(count):
        who, other = draw.sample(PEOPLE, 2)
        query = f"{INSTRUCTION} {who} {draw.choice(ACTS)} {draw.choice(THINGS)} {draw.choice(PLACES)}, and {other} "
        query += f"{draw.choice(ACTS)} {draw.choice(NUMBERS)} {draw.choice(GOODS)} {draw.choice(PLACES)}."
        if draw.random() < 0.5:
            query += f" {who} {draw.choice(ACTS)} {draw.choice(NUMBERS)} more."
        query += f" Then {draw.choice((who, other))} {draw.choice(ACTS)}"
        yield {"id": number, "query": query, "choices": draw.sample(ENDINGS, 4), "gold": draw.randrange(4)}


class Meter:
    """Wall seconds and processor seconds of all threads, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books what happens meanwhile on a phase."""
        began = perf_counter(), process_time()
        try:
            yield
        finally:
            booked = self.seconds.setdefault(name, [0.0, 0.0])
            booked[0] += perf_counter() - began[0]
            booked[1] += process_time() - began[1]

    def rows(self, count: int) -> Iterator[str]:
        """A line per phase and one for all, with milliseconds of wall time for each of `count` questions."""
        total = [sum(one[i] for one in self.seconds.values()) for i in (0, 1)]
        for name, (wall, cpu) in [*self.seconds.items(), ("together", total)]:
            yield f"{name:10} {wall:9.2f} s wall {cpu:9.2f} s processor {1e3 * wall / count:9.4f} ms a question"


def peak() -> str:
    """The most resident memory that this process has had, as text."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


def tiny_model(directory: Path) -> Path:
    """A two-layer Llama with random weights and the demo's tokenizer."""
    torch.manual_seed(0)
    vocabulary = json.loads((demo.MODEL / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=512, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(directory)
    for file in demo.MODEL.glob("token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def plan(path: Path, scorer: Scorer, window: int) -> tuple[Meter, Totals]:
    """Reads, encodes, plans and stages a file's questions, window by window, and keeps nothing but the counts."""
    meter, totals = Meter(), None
    longest = max_input_length(scorer.runtime.config, scorer.tokenizer)
    with meter.phase("check"):
        dataset = read_windows(path, "auto", None, window)
    windows = iter(dataset.questions if isinstance(dataset.questions, Windows) else [dataset.questions])
    with scorer.runtime.planner.same_shapes():
        while True:
            with meter.phase("read"):
                questions = next(windows, None)
            if questions is None:
                break
            with meter.phase("encode"):
                encoded = encode(questions, scorer.tokenizer, longest)
            with meter.phase("plan"):
                planned = scorer.workload(encoded.sequences, fit=False).plan
            assert planned is not None
            with meter.phase("stage"):
                for _ in stage_all(planned):
                    pass
            totals = Totals.of(planned) if totals is None else totals.and_then(planned)
            del questions, encoded, planned
    assert totals is not None
    return meter, totals


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory() as directory:
        model, path = tiny_model(Path(directory)), Path(directory) / "rows.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(options.rows, options.seed))
        print(f"{options.rows:,} questions, {path.stat().st_size / 1e6:.0f} MB, windows of {options.window:,}")
        scorer = Scorer.from_pretrained(model, device="cpu")
        print(f"resident memory before: {peak()}")
        meter, totals = plan(path, scorer, options.window)
        print("\n".join(meter.rows(options.rows)))
        print(f"resident memory, its peak so far: {peak()}")
        shared = f"{totals.unshared_tokens:,} unshared, {totals.useful_tokens:,} useful, {totals.slots:,} slots"
        print(f"{totals.windows} windows, tokens: {shared}, {totals.prefix_tree_tokens:,} in the windows' prefix trees")
        if options.score:
            score(path, scorer, options, Path(directory) / "out")


def score(path: Path, scorer: Scorer, options: argparse.Namespace, output: Path) -> None:
    """Runs the first questions as `cecompile eval` does, journal and files included."""
    clock, meter = Clock(), Meter()
    clock.enter("preprocess")
    with meter.phase("evaluate"), Journal(output) as journal:
        dataset = read_windows(path, "auto", options.score, options.score_window or options.window)
        results = evaluate(scorer, dataset.questions, clock=clock, output=output, journal=journal).results
    count, phases = results["questions"], results["phases_s"]
    print(f"scored {count:,} questions in {results['plan'].get('windows', 1)} windows: acc {results['metrics']['acc']}")
    print("\n".join(meter.rows(count)).splitlines()[0])
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items()))
    print(f"resident memory, its peak so far: {peak()}")
    once = phases["load_model"] + phases["warmup"]
    whole = once + (sum(phases.values()) - once) * options.rows / count
    print(f"extrapolated, not measured: {options.rows:,} questions in {whole:.0f} s, by the rate of the {count:,}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=WINDOW, help="questions in memory at a time")
    parser.add_argument("--score", type=int, default=0, metavar="N", help="score the first N too")
    parser.add_argument("--score-window", type=int, help="questions in memory at a time while scoring")
    return parser.parse_args()


if __name__ == "__main__":
    main()
