"""How fast, against what people run today and against what the hardware allows, side by side in one process.

    python scripts/bench.py --shape llama-7b --tokenizer DIR --data hellaswag_val.jsonl --device cuda --dtype bfloat16
    python scripts/bench.py --shape tiny --tokenizer DIR --data hellaswag_val.jsonl --questions 200

Makes a model of the shape with random weights on the device (speed does not depend on their values), scores the same
questions in several ways, and prints a table:

    lm_eval      lm-evaluation-harness's `hf` backend: its own request loop over tokenised requests, where it is
                 installed; else the same algorithm (one padded sequence per choice, longest first, log-softmax over
                 the whole vocabulary at every position)
    cecompile    the static pass, compiled, and on CUDA captured; then without capture, and without compilation
    GEMM floor   the model's linear layers on the useful tokens and its head on the readouts, and nothing else

Each time is the best of --repeats. With --sample N all but the fastest batch size, cecompile and the floor are measured
on N questions only, evenly spaced, and compared by their rates.
"""

import argparse
import functools
import gc
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cecompile.engine.forward import Engine
from cecompile.model.checkpoint import DTYPES, load_tokenizer
from cecompile.planning.bucket_size import TUNING
from cecompile.run.language_model import resolve_device
from cecompile.run.scorer import collect
from cecompile.tasks.judge import judge, metrics
from cecompile.tasks.question import Question
from cecompile.tasks.read import read_questions
from cecompile.workload.encode import encode
from cecompile.workload.plan import Plan, choose_geometry, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass, stage_all

LLAMA = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": LLAMA | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "llama-1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4},
    "llama-7b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "phi3-medium": {  # as published with microsoft/Phi-3-medium-4k-instruct
        "model_type": "phi3", "vocab_size": 32_064, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "hidden_size": 5120, "intermediate_size": 17_920,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10, "sliding_window": 2047,
        "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 32_000,
        "pad_token_id": 32_000, "tie_word_embeddings": False,
    },
    "opt-1b": {
        "model_type": "opt", "vocab_size": 50_272, "max_position_embeddings": 2048, "hidden_size": 2048,
        "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    },
}  # fmt: skip
BATCH_SIZES = {"cpu": (8, 32), "cuda": (16, 64, 256)}
PROFILED = 24  # passes
MAIN = "cecompile"
VARIANTS = {
    MAIN: {"compiled": True},
    "cecompile, not captured": {"compiled": True, "captured": False},
    "cecompile, not compiled": {"compiled": False, "captured": False},
}


@dataclass(frozen=True)
class Work:
    """Questions to score, tokenised, planned and staged, with the seconds that each step took."""

    questions: Sequence[Question]
    sequences: Sequences
    plan: Plan
    staged: Sequence[StagedPass]
    phases: dict[str, float]


def main() -> None:
    options = _arguments()
    device = resolve_device(options.device)
    if options.memory_limit and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_limit * 1e9 / total, device)
    model = random_model(SHAPES[options.shape], device, DTYPES[options.dtype])
    tokenizer = load_tokenizer(options.tokenizer)
    questions = read_questions(options.data, limit=options.questions)
    full = prepare(questions, tokenizer, model, options)
    sample = full
    if options.sample and options.sample < len(questions):
        evenly = np.linspace(0, len(questions) - 1, options.sample).astype(int)
        sample = prepare([questions[i] for i in evenly], tokenizer, model, options)

    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, work: Work, run: Callable[[], dict[str, Any]]) -> None:
        size = {"questions": len(work.questions), "useful_tokens": work.plan.useful_tokens}
        rows[name] = size | or_out_of_memory(run)
        print(name, rows[name].get("seconds"), flush=True)

    def harness(work: Work, size: int) -> None:
        name = f"lm_eval hf, batch {size}" + ("" if work is full else f", {len(work.questions)} questions")
        measure(name, work, lambda: time_harness(model, tokenizer, work, size, options.repeats))

    sizes = options.batch_sizes if options.batch_sizes is not None else BATCH_SIZES[device.type]
    for size in sizes:
        harness(sample, size)
    best = max(zip(map(rate, rows.values()), sizes, strict=True), default=(0.0, 0))
    if sample is not full and best[0] and not options.harness_on_sample:
        harness(full, best[1])
    for name, how in VARIANTS.items():
        if device.type == "cuda" or "captured" not in how or not how["compiled"]:
            work = full if name == MAIN else sample
            measure(name, work, functools.partial(time_engine, model, work, options, how))
    measure("GEMM floor", full, lambda: time_gemms(model, full.plan, options.repeats))
    on_cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_cuda else f"{torch.get_num_threads()} CPU threads"
    report = {name: getattr(options, name) for name in ("shape", "dtype", "attention")}
    report |= {"device": where, "torch": torch.__version__, "questions": len(questions), "phases_s": full.phases}
    report |= {name: getattr(full.plan, name) for name in ("useful_tokens", "slots", "unshared_tokens")}
    report |= {"rows": rows, "memory_limit": options.memory_limit}
    print_report(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def prepare(questions: Sequence[Question], tokenizer: Any, model: PreTrainedModel, options: argparse.Namespace) -> Work:
    """Tokenises, plans and stages."""
    began = time.perf_counter()
    sequences = encode(questions, tokenizer, model.config.max_position_embeddings).sequences
    encoded = time.perf_counter()
    plan = _plan(sequences, options, model.device)
    staged = list(stage_all(plan))
    phases = {"encode": encoded - began, "plan": time.perf_counter() - encoded}
    return Work(questions, sequences, plan, staged, phases)


def rate(row: dict[str, Any]) -> float:
    """Questions a second; 0 for what failed."""
    return row["questions"] / row["seconds"] if row.get("seconds") else 0.0


def random_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the shape, its weights drawn on the device."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def time_harness(model: PreTrainedModel, tokenizer: Any, work: Work, batch_size: int, repeats: int) -> dict[str, Any]:
    """Seconds of lm_eval's loop over tokenised requests, and its metrics."""
    model.set_attn_implementation("sdpa")
    if importlib.util.find_spec("lm_eval") is None:
        seconds, values = best_of(repeats, lambda: score_padded(model, work.sequences, batch_size))
        return {"seconds": seconds, "own_loop": True, "metrics": _metrics(work.questions, values)}
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    pairs = [(q.context, q.delimiter + choice) for q in work.questions for choice in q.choices]
    requests = [(pair, *backend._encode_pair(*pair)) for pair in pairs]
    backend._loglikelihood_tokens(requests[: 2 * batch_size], disable_tqdm=True)  # settles allocators and caches
    seconds, answers = best_of(repeats, lambda: backend._loglikelihood_tokens(requests, disable_tqdm=True))
    return {"seconds": seconds, "metrics": _metrics(work.questions, np.array([value for value, _ in answers]))}


@torch.inference_mode()
def score_padded(model: PreTrainedModel, sequences: Sequences, batch_size: int) -> Any:
    """Computes (n,) loglikelihoods as lm_eval's `hf` backend does, from padded batches, longest sequences first."""
    out = np.zeros(len(sequences))
    order = np.argsort(-sequences.input_lengths, kind="stable").tolist()
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        padded = np.zeros((len(batch), len(sequences.inputs(batch[0]))), dtype=np.int64)
        for row, i in enumerate(batch):
            padded[row, : len(sequences.inputs(i))] = sequences.inputs(i)
        logits = model(torch.from_numpy(padded).to(model.device), use_cache=False).logits
        logprobs = torch.log_softmax(logits, dim=-1)
        for row, i in enumerate(batch):
            target = torch.from_numpy(sequences.targets(i).astype(np.int64)).to(model.device)
            end = len(sequences.inputs(i))
            chosen = logprobs[row, end - len(target) : end]
            (chosen.argmax(dim=-1) == target).all().item()
            out[i] = chosen.gather(1, target[:, None]).sum().item()
    return out


def time_engine(model: PreTrainedModel, work: Work, options: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    """Seconds of warm-up and of inference, and the metrics; on CUDA also how busy the device is, and its memory."""
    chunk, on_cuda = TUNING[model.device.type].readout_chunk, model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    began = time.perf_counter()
    engine = Engine(model, work.plan.buckets, attention=options.attention, readout_chunk=chunk, **how)
    engine.warm_up()
    _wait(model.device)
    warm = time.perf_counter() - began
    seconds, readouts = best_of(options.repeats, lambda: engine.run(work.staged))
    loglikelihood, _ = collect(len(work.sequences), work.staged, readouts)
    row = {"seconds": seconds, "warmup_seconds": warm, "metrics": _metrics(work.questions, loglikelihood)}
    if on_cuda:
        row["peak_bytes"] = torch.cuda.max_memory_reserved(model.device)
        row["busy"] = busy_share(lambda: engine.run(work.staged[:PROFILED]))
    return row


def busy_share(run: Callable[[], Any]) -> float:
    """The share of the time from the first to the last thing the CUDA device does in which it does something."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    on_device = [e.time_range for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((span.start, span.end) for span in on_device)
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - spans[0][0])


@torch.inference_mode()
def time_gemms(model: PreTrainedModel, plan: Plan, repeats: int) -> dict[str, Any]:
    """Seconds of the linear layers alone: all but the head on the useful tokens, the head on the readouts.

    Runs the plan's largest bucket as often as its slots go into the useful tokens, fractions counted; on CUDA as one
    graph.
    """
    bucket, device = plan.buckets[0], model.device
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    widths = {m.in_features for m in [*layers, head]}
    inputs = {k: torch.randn(bucket.slots, k, device=device, dtype=model.dtype) for k in widths}
    readouts = sum(len(row.position) for one in plan.passes for row in one.rows)
    chunk = TUNING[device.type].readout_chunk
    passes = plan.useful_tokens / bucket.slots
    chunks = max(1, round(readouts / passes / chunk))

    def linears() -> None:
        for layer in layers:
            nn.functional.linear(inputs[layer.in_features], layer.weight)
        for _ in range(chunks):
            nn.functional.linear(inputs[head.in_features][:chunk], head.weight)

    run = linears
    if device.type == "cuda":
        linears()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            linears()
        run = graph.replay
    times = max(1, round(passes))
    run()

    def all_passes() -> None:
        for _ in range(times):
            run()
        _wait(device)

    seconds, _ = best_of(repeats, all_passes)
    return {"seconds": seconds / times * passes}


def best_of(repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest of `repeats` runs in seconds, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        out = run()
        best = min(best, time.perf_counter() - began)
    return best, out


def or_out_of_memory(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement, or what stopped it: a batch size that does not fit is a result too."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"seconds": None, "failed": "out of memory"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _plan(sequences: Sequences, options: argparse.Namespace, device: torch.device) -> Plan:
    tuning = TUNING[device.type]
    geometry = choose_geometry(
        int(sequences.input_lengths.max()),
        tokens_per_bucket=options.tokens_per_bucket or tuning.tokens_per_bucket,
        blocks=options.attention == "flex",
        readout_chunk=tuning.readout_chunk,
    )
    return make_plan(sequences, geometry)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _metrics(questions: Sequence[Question], loglikelihood: Any) -> dict[str, float | None]:
    samples, at = [], 0
    for question in questions:
        values = loglikelihood[at : at + len(question.choices)]
        samples.append(judge(question, values, [False] * len(values)))
        at += len(values)
    return metrics(samples)


def print_report(report: dict[str, Any]) -> None:
    """The table: every row's speed, and its ratio to the best lm_eval row and to the floor."""
    rows = report["rows"]
    harness = max((rate(r) for n, r in rows.items() if n.startswith("lm_eval")), default=0.0)
    whole = [rate(r) for n, r in rows.items() if n.startswith("lm_eval") and r["questions"] == report["questions"]]
    harness = max(whole, default=harness)
    floor = rate(rows["GEMM floor"])
    table = Table(title=f"{report['shape']} {report['dtype']}, {report['questions']} questions, {report['device']}")
    table.add_column("")
    for column in ("seconds", "questions/s", "useful tokens/s", "acc", "acc_norm", "x lm_eval", "x floor"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        seconds, scores = row["seconds"], row.get("metrics")
        if seconds is None:
            table.add_row(name, row["failed"])
            continue
        speeds = (f"{seconds:.2f}", f"{rate(row):.1f}", f"{row['useful_tokens'] / seconds:,.0f}")
        right = [f"{scores[metric]:.4f}" if scores else "" for metric in ("acc", "acc_norm")]
        times = (f"{rate(row) / harness:.2f}" if harness else "", f"{floor / rate(row):.3f}" if floor else "")
        table.add_row(name + (" (own loop)" if row.get("own_loop") else ""), *speeds, *right, *times)
    Console(width=120).print(table)
    ours = rows[MAIN]
    print(
        f"encoding {report['phases_s']['encode']:.2f} s, planning {report['phases_s']['plan']:.2f} s"
        + (f", warm-up {ours['warmup_seconds']:.2f} s" if ours["seconds"] else "")
        + f"; {report['useful_tokens']:,} useful tokens in {report['slots']:,} slots, "
        f"{report['unshared_tokens']:,} with one sequence per choice"
        + (f"; device busy {ours['busy']:.2%}, peak {ours['peak_bytes'] / 1e9:.1f} GB" if "busy" in ours else "")
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokenizer", required=True, help="model directory or hub id with the tokenizer")
    parser.add_argument("--data", required=True)
    parser.add_argument("--questions", type=int, help="the first N; default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--attention", choices=("sdpa", "flex"), default="sdpa")
    parser.add_argument("--tokens-per-bucket", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="*", help="of lm_eval; none leaves it out")
    parser.add_argument("--sample", type=int, help="questions for the rows that only compare; default all")
    parser.add_argument("--harness-on-sample", action="store_true", help="do not run lm_eval on all questions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-limit", type=float, help="GB, on CUDA")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
