"""lm-evaluation-harness with our backend against its own `hf`, in one process.

    python scripts/bench_lm_eval.py --model DIR --data hellaswag_val.jsonl --questions 400 --fidelity 100
    python scripts/bench_lm_eval.py --shape tiny --tokenizer DIR --data hellaswag_val.jsonl --questions 60 --shots 5

Runs the harness's own HellaSwag task on the first rows of the file, with the last rows as fixed examples. The model is
a checkpoint, or has random weights of a shape. Ours evaluates once for warm-up. Then ours and `hf` at each batch size
take turns, as often as --repeats says, and of each the best time counts. Timed is the scoring, from tokenised requests
to loglikelihoods: our time includes planning and packing. With --fidelity N both are compared with `hf` in float32 on
N rows.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import SHAPES, numbers, random_model
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import process_docs
from rich.console import Console
from rich.table import Table

from cecompile.lm_eval import CecompileLM
from cecompile.model.checkpoint import DTYPES, load_tokenizer
from cecompile.run.language_model import resolve_device

TASK = {
    "task": "hellaswag_rows", "dataset_path": "json", "output_type": "multiple_choice", "process_docs": process_docs,
    "test_split": "test", "fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"},
    "doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


def main() -> None:
    options = _arguments()
    logging.disable(logging.WARNING)
    device = resolve_device(options.device)
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    ours, theirs = (backend(kind, options, device, tokenizer, options.dtype) for kind in (CecompileLM, HFLM))
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        task = write_task(Path(folder), options)
        first = measure(ours, task)["seconds"]
        for _ in range(options.repeats):
            keep_best(rows, "cecompile", measure(ours, task))
            for size in options.batch_sizes:
                theirs.batch_size_per_gpu = size
                keep_best(rows, f"hf, batch {size}", measure(theirs, task))
        if options.fidelity:
            options.questions = options.fidelity
            stock = backend(HFLM, options, device, tokenizer, "float32")
            stock.batch_size_per_gpu = max(options.batch_sizes, default=1)
            exact = measure(stock, write_task(Path(folder), options))
            for row in rows.values():
                row["error"] = float(np.abs(row["values"][: len(exact["values"])] - exact["values"]).mean())
    print_report(rows, options)
    print(json.dumps({"first_run_seconds": first, "torch": torch.__version__}))


def backend(kind: type[HFLM], options: argparse.Namespace, device: torch.device, tokenizer: Any, dtype: str) -> HFLM:
    """The backend of this class, with the checkpoint or a random model in `dtype`."""
    if options.model:
        return kind(pretrained=options.model, tokenizer=tokenizer, device=str(device), dtype=dtype)
    return kind(pretrained=random_model(SHAPES[options.shape], device, DTYPES[dtype]), tokenizer=tokenizer)


def keep_best(rows: dict[str, dict[str, Any]], name: str, row: dict[str, Any]) -> None:
    """Of several runs the fastest one counts."""
    print(name, row["seconds"], flush=True)
    rows[name] = min(rows.get(name, row), row, key=lambda one: one["seconds"])


def measure(lm: HFLM, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of scoring, and what comes out."""
    score, seconds = lm._loglikelihood_tokens, []

    def timed(*given: Any, **more: Any) -> Any:
        began = time.perf_counter()
        out = score(*given, **more)
        seconds.append(time.perf_counter() - began)
        return out

    lm._loglikelihood_tokens = timed
    loaded = TaskManager(include_defaults=False).load([dict(task)])
    out = evaluate(lm, loaded, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    lm._loglikelihood_tokens = score
    values = [float(reply[0][0]) for sample in out["samples"][task["task"]] for reply in sample["resps"]]
    metrics = {name: out["results"][task["task"]][f"{name},none"] for name in ("acc", "acc_norm")}
    return {"seconds": sum(seconds), "values": np.array(values)} | metrics


def write_task(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The task's configuration, its rows written beside it."""
    with open(options.data, encoding="utf-8") as file:
        lines = file.readlines()
    (folder / "test.jsonl").write_text("".join(lines[: options.questions]))
    (folder / "examples.jsonl").write_text("".join(lines[-max(1, options.shots) :]))
    files = {"test": str(folder / "test.jsonl"), "examples": str(folder / "examples.jsonl")}
    return TASK | {"dataset_kwargs": {"data_files": files}, "num_fewshot": options.shots}


def print_report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """The table: seconds, metrics, how many times faster ours is, and the largest difference."""
    ours = rows["cecompile"]
    name = options.model or options.shape
    title = f"{name} {options.dtype}, {len(ours['values']) // 4} questions, {options.shots} examples"
    columns = numbers("seconds", "acc", "acc_norm", "cecompile is", "largest difference", "mean error")
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        ratio, apart = row["seconds"] / ours["seconds"], np.abs(row["values"] - ours["values"]).max()
        cells = (f"{row['seconds']:.2f}", f"{row['acc']:.4f}", f"{row['acc_norm']:.4f}", f"{ratio:.2f} x")
        table.add_row(name, *cells, f"{apart:.1e}", f"{row['error']:.4g}" if "error" in row else "")
    Console(width=120).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's directory; default: random weights of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokenizer", help="directory or hub id with the tokenizer; default: --model's")
    parser.add_argument("--data", required=True, help="HellaSwag rows, .jsonl")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 32], help="of hf")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fidelity", type=int, default=0, help="rows compared with float32")
    options = parser.parse_args()
    if not options.model and not options.tokenizer:
        parser.error("--model, or --tokenizer for random weights")
    if options.fidelity > options.questions:
        parser.error(f"--fidelity: {options.fidelity} rows, but --questions is {options.questions}")
    for path in (options.data, options.model):
        if path and not Path(path).exists():
            parser.error(f"{path}: not found")
    return options


if __name__ == "__main__":
    main()
