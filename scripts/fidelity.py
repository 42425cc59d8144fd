"""Is half precision as good through trees as through the stock model?

    python scripts/fidelity.py [--model DIR | --random] [--data FILE] [--dtype bfloat16 float16] [--device cuda]

Scores the same questions three times: the stock model in float32, one choice at a time (taken as exact); the stock
model in half precision, likewise; and the compiled trees in half precision. Prints the root mean square error of each
half-precision loglikelihood, their ratio, and how many predictions agree with the exact ones. Default: the embedded
demo, a model whose logits mean something. With --random: a Llama of 16 layers and 1024 wide with the demo's tokenizer
and random weights, scaled so that its logits vary as those of a trained model do.
"""

import argparse
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from bench import numbers
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cecompile import Question, Scorer, demo, read_questions


@dataclass(frozen=True, slots=True)
class Outcome:
    """Every loglikelihood in one array, and each question's prediction."""

    loglikelihoods: NDArray[np.float64]
    predictions: NDArray[np.int64]

    def error(self, exact: "Outcome") -> float:
        """Root mean square of the differences, natural logarithm."""
        return float(np.sqrt(np.mean((self.loglikelihoods - exact.loglikelihoods) ** 2)))

    def agreement(self, exact: "Outcome") -> float:
        """Share of equal predictions."""
        return float(np.mean(self.predictions == exact.predictions))


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory() as directory:
        if options.random:
            options.model = write_random_model(directory)
        compare(options)


def write_random_model(directory: str) -> str:
    """Writes a checkpoint with random weights whose logits have a standard deviation of about 3."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=2816, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=4, initializer_range=1024**-0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.mul_(3)  # final hidden states have unit variance
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def compare(options: argparse.Namespace) -> None:
    """Prints the table."""
    questions = read_questions(options.data, limit=options.questions)
    exact = outcome(questions, options, "reference", "float32")
    columns = numbers("dtype", "stock error", "trees error", "ratio", "stock agrees", "trees agree")
    table = Table(*columns, title=f"{len(questions)} questions, errors against the stock model in float32")
    for dtype in options.dtype:
        both = [outcome(questions, options, engine, dtype) for engine in ("reference", "compiled")]
        stock, trees = (one.error(exact) for one in both)
        agreements = (f"{100 * one.agreement(exact):.2f} %" for one in both)
        table.add_row(dtype, f"{stock:.4f}", f"{trees:.4f}", f"{trees / stock:.3f}", *agreements)
    Console(width=100).print(table)


def outcome(questions: list[Question], options: argparse.Namespace, engine: str, dtype: str) -> Outcome:
    """Scores the questions with one engine and dtype."""
    how = {"device": options.device, "dtype": dtype, "engine": engine, "attention": options.attention}
    scores = Scorer.from_pretrained(options.model, **how).score(questions).loglikelihoods
    return Outcome(np.concatenate(scores), np.array([int(np.argmax(s)) for s in scores]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.MODEL))
    parser.add_argument("--random", action="store_true", help="a random model instead of --model")
    parser.add_argument("--data", default=str(demo.HELLASWAG))
    parser.add_argument("--questions", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", choices=("auto", "flex", "sdpa"), default="auto")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16", "float16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
