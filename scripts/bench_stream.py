"""Weights streamed layer by layer against weights in memory, each in a process of its own, by the command line.

    python scripts/bench_stream.py --make llama-7b --model /dev/shm/7b --tokenizer DIR
    python scripts/bench_stream.py --model /dev/shm/7b --data hellaswag_val.jsonl --memory-limit 12GB
    python scripts/bench_stream.py --model /dev/shm/30b --data hellaswag_val.jsonl --memory-limit 30GB --streamed-only

With --make a checkpoint of a shape is written, with random weights in bfloat16 that are drawn on the device and written
layer by layer: no more than one layer of it is ever in memory. Otherwise the questions are scored by a model in memory,
with whatever the device has, and by one that is streamed within --memory-limit; printed are both inference times,
their ratio, the peak, whether all predictions are the same, and how the weights came.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import LLAMA, SHAPES
from safetensors.torch import save_file
from transformers import AutoConfig

from cecompile.model.checkpoint import load_tokenizer
from cecompile.model.structure import decoder_layers, on_meta
from cecompile.run.language_model import resolve_device

LARGE = {"hidden_size": 6656, "intermediate_size": 17_920, "num_hidden_layers": 60, "num_attention_heads": 52}
MADE = {name: SHAPES[name] for name in ("tiny", "llama-1b", "llama-7b", "phi3-medium")} | {"llama-30b": LLAMA | LARGE}


def main() -> None:
    options = _arguments()
    if options.make:
        make(options.make, options.model, options.tokenizer, resolve_device(options.device))
        return
    streamed = run(options, "streamed", "--memory-limit", options.memory_limit, "--stream-weights")
    whole = None if options.streamed_only else run(options, "whole")
    for name, results in (("in memory", whole), ("streamed", streamed)):
        if results is not None:
            peak = results["memory"]["peak_bytes"] / 1e9
            print(f"{name}: inference {results['latency_s']['inference']:.2f} s, peak {peak:.2f} GB")
            print(f"  phases {json.dumps({k: round(v, 2) for k, v in results['phases_s'].items()})}")
            print(f"  engine {json.dumps(results['engine'])}")
    memory = streamed["memory"]
    limit, predicted = memory["limit_bytes"], memory["predicted_bytes"]
    within = "within" if memory["peak_bytes"] <= limit else "PAST"
    print(f"peak {within} the limit of {limit / 1e9:.2f} GB; predicted {predicted / 1e9:.2f} GB")
    print(f"streaming {json.dumps(streamed['streaming'])}")
    print(f"verified: {streamed['model']['verified']}")
    if whole is not None:
        print(f"streamed / in memory: {streamed['latency_s']['inference'] / whole['latency_s']['inference']:.3f}")
        files = [options.output / name / "samples.jsonl" for name in ("whole", "streamed")]
        pairs = [
            [json.loads(line) for line in pair]
            for pair in zip(*(file.read_text().splitlines() for file in files), strict=True)
        ]
        differing = sum(any(a[key] != b[key] for key in ("id", "prediction", "prediction_norm")) for a, b in pairs)
        farthest = max(np.abs(np.subtract(a["loglikelihoods"], b["loglikelihoods"])).max() for a, b in pairs)
        print(f"predictions: {differing} of {len(pairs)} differ; loglikelihoods differ by up to {farthest:.2g}")


def run(options: argparse.Namespace, name: str, *more: str) -> dict[str, Any]:
    """The results of one run of the command line."""
    command = [sys.executable, "-m", "cecompile", "eval", "--model", str(options.model), "--device", options.device]
    for option in ("data", "task", "limit", "repeat", "tokens_per_bucket", "dtype"):
        value = getattr(options, option)
        command += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    directory = options.output / name
    subprocess.run([*command, "--output", str(directory), "--overwrite", *more], check=True, stdout=subprocess.DEVNULL)
    results: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return results


def make(shape: str, directory: Path, tokenizer: str, device: torch.device) -> None:
    """Writes a checkpoint of random weights, a file per layer and one for the rest."""
    began = time.perf_counter()
    loaded = load_tokenizer(tokenizer)
    vocabulary = max(MADE[shape]["vocab_size"], -(-len(loaded) // 64) * 64)
    config = AutoConfig.for_model(**(MADE[shape] | {"vocab_size": vocabulary}))
    config.dtype = torch.bfloat16
    model = on_meta(config)
    config.architectures = [type(model).__name__]
    names = {module: name for name, module in model.named_modules()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    groups = [[n for n in shapes if n.startswith(f"{names[layer]}.")] for layer in decoder_layers(model)]
    in_layers = {name for group in groups for name in group}
    groups.append([name for name in shapes if name not in in_layers])
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    size = 0

    def drawn(shape: torch.Size) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return (empty.fill_(1) if len(shape) == 1 else empty.normal_(std=0.02)).cpu()

    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: drawn(shapes[name]) for name in group}
        save_file(tensors, directory / file, {"format": "pt"})
        index |= dict.fromkeys(group, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    whole = {"metadata": {"total_size": size}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(whole))
    config.save_pretrained(directory)
    loaded.save_pretrained(directory)
    print(f"{shape}: {size / 1e9:.2f} GB in {directory}, {time.perf_counter() - began:.1f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, Path("results/stream"))
    parser.add_argument("--make", choices=MADE, help="write a checkpoint of this shape there")
    parser.add_argument("--tokenizer", help="directory or hub id, for --make")
    parser.add_argument("--memory-limit", default="12GB", help="of the streamed run")
    parser.add_argument("--streamed-only", action="store_true", help="for models that do not fit")
    return parser.parse_args()


def add_run_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    """The options that `run` looks at; results go to `output` by default."""
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--data")
    parser.add_argument("--task")
    parser.add_argument("--limit", help="the first N questions")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--repeat", type=int)
    parser.add_argument("--tokens-per-bucket")
    parser.add_argument("--output", type=Path, default=output)


if __name__ == "__main__":
    main()
