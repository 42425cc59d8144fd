"""How fast, against what people run today, side by side in one process.

    python scripts/bench.py --shape tiny --tokenizer DIR --data hellaswag_val.jsonl --questions 200

Makes a model of the shape with random weights (speed does not depend on their values), scores the first questions of
the data with lm-evaluation-harness's own `hf` backend (its request loop is what is timed) and with this package's
engine, and prints a table. Times are the best of --repeats, all taken in this one process.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cecompile.engine.forward import Engine
from cecompile.engine.model import DTYPES, load_tokenizer, resolve_device
from cecompile.scorer import TUNING
from cecompile.tasks.judge import judge, metrics
from cecompile.tasks.question import Question
from cecompile.tasks.read import read_questions
from cecompile.workload.encode import encode
from cecompile.workload.plan import choose_geometry, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import stage_all

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
BATCH_SIZES = (8, 32)


def main() -> None:
    options = _arguments()
    device = resolve_device(options.device)
    model = random_model(SHAPES[options.shape], device, DTYPES[options.dtype])
    tokenizer = load_tokenizer(options.tokenizer)
    questions = read_questions(options.data, limit=options.questions)
    sequences = encode(questions, tokenizer, model.config.max_position_embeddings).sequences

    harness = {}
    for size in options.batch_sizes:
        harness[size] = time_harness(model, tokenizer, questions, size, options.repeats)
    best = min(harness, key=lambda size: harness[size]["seconds"], default=None)
    ours = time_engine(model, questions, sequences, options)
    report = {
        "shape": options.shape,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "questions": len(questions),
        "lm_eval": {str(size): result for size, result in harness.items()},
        "cecompile": ours,
        "speedup": None if best is None else harness[best]["seconds"] / ours["seconds"],
    }
    _print(report, best)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def random_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of the shape, its weights drawn on the device; 32,000 tokens, 4,096 positions."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=32_000, max_position_embeddings=4096, **shape)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def time_harness(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question], batch_size: int, repeats: int
) -> dict[str, Any]:
    """Seconds of lm_eval's loop over tokenised requests, and its metrics."""
    from lm_eval.models.huggingface import HFLM

    model.set_attn_implementation("sdpa")
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    pairs = [(q.context, q.delimiter + choice) for q in questions for choice in q.choices]
    requests = [(pair, *backend._encode_pair(*pair)) for pair in pairs]
    backend._loglikelihood_tokens(requests[: 2 * batch_size], disable_tqdm=True)  # settles allocators and caches
    seconds, answers = best_of(repeats, lambda: backend._loglikelihood_tokens(requests, disable_tqdm=True))
    return {"seconds": seconds, "metrics": _metrics(questions, np.array([value for value, _ in answers]))}


def time_engine(
    model: PreTrainedModel, questions: Sequence[Question], sequences: Sequences, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of planning, warm-up and inference, and the metrics."""
    tuning = TUNING[model.device.type]
    began = time.perf_counter()
    geometry = choose_geometry(
        int(sequences.input_lengths.max()),
        tokens_per_bucket=options.tokens_per_bucket or tuning.tokens_per_bucket,
        blocks=options.attention == "flex",
        readout_chunk=tuning.readout_chunk,
    )
    plan = make_plan(sequences, geometry)
    staged = list(stage_all(plan))
    planned = time.perf_counter()
    engine = Engine(model, plan.buckets, attention=options.attention, compiled=True, readout_chunk=tuning.readout_chunk)
    engine.warm_up()
    warm = time.perf_counter()
    seconds, readouts = best_of(options.repeats, lambda: engine.run(staged))
    loglikelihood = np.zeros(len(sequences))
    for one, out in zip(staged, readouts, strict=True):
        np.add.at(loglikelihood, one.choice, out.logprob)
    return {
        "seconds": seconds,
        "plan_seconds": planned - began,
        "warmup_seconds": warm - planned,
        "useful_tokens": plan.useful_tokens,
        "slots": plan.slots,
        "unshared_tokens": plan.unshared_tokens,
        "metrics": _metrics(questions, loglikelihood),
    }


def best_of(repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest of `repeats` runs in seconds, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        out = run()
        best = min(best, time.perf_counter() - began)
    return best, out


def _metrics(questions: Sequence[Question], loglikelihood: Any) -> dict[str, float | None]:
    samples, at = [], 0
    for question in questions:
        values = loglikelihood[at : at + len(question.choices)]
        samples.append(judge(question, values, [False] * len(values)))
        at += len(values)
    return metrics(samples)


def _print(report: dict[str, Any], best: int | None) -> None:
    table = Table(title=f"{report['shape']}, {report['dtype']}, {report['questions']} questions, {report['device']}")
    for column, side in (("", "left"), ("seconds", "right"), ("questions/s", "right"), ("acc", "right"),
                         ("acc_norm", "right"), ("speedup", "right")):  # fmt: skip
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    against = report["cecompile" if best is None else "lm_eval"]
    against = (against if best is None else against[str(best)])["seconds"]
    rows = [(f"lm_eval hf, batch {size}", result) for size, result in report["lm_eval"].items()]
    for name, result in [*rows, ("cecompile, inference", report["cecompile"])]:
        seconds, scores = result["seconds"], result["metrics"]
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{report['questions'] / seconds:.1f}",
            f"{scores['acc']:.4f}",
            f"{scores['acc_norm']:.4f}",
            f"{against / seconds:.2f}",
        )
    Console().print(table)
    ours = report["cecompile"]
    print(
        f"planning {ours['plan_seconds']:.2f} s, warm-up {ours['warmup_seconds']:.2f} s; "
        f"{ours['useful_tokens']:,} useful tokens in {ours['slots']:,} slots, "
        f"{ours['unshared_tokens']:,} with one sequence per choice"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokenizer", required=True, help="model directory or hub id with the tokenizer")
    parser.add_argument("--data", required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--attention", choices=("sdpa", "flex"), default="sdpa")
    parser.add_argument("--tokens-per-bucket", type=int)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="*", default=BATCH_SIZES, help="of lm_eval; none leaves it out"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
