"""Answering chat questions, against the official loop and against batched generation, in one process.

    python scripts/bench_chat.py --shape phi3-medium --tokenizer DIR --data openbook_qa.jsonl --device cuda \\
        --dtype bfloat16 --memory-limit 30 --sample 50

Makes a model of the shape with random weights on the device, turns rows of query, choices and gold into the 2024
contest's chat rows, and times what its script times (loading the data, tokenising, inference, text) in several ways:

    pipeline          the official loop: the text-generation pipeline, one conversation after another
    generate, batch N `generate` on padded batches, longest prompts first, by the stock model
    cecompile         answers read from token trees

A random model copies no choice, so the answer is forced on every side, by what amounts to a large bias on the logits of
the gold choice's next token while the answer follows it, and of the end token after it. --long adds rows with prompts
of that many tokens. With --sample N the pipeline and all but the fastest batch size run on N rows, evenly spaced, and
are compared by their rates.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import SHAPES, numbers, or_out_of_memory, random_model, rate
from rich.console import Console
from rich.table import Table
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, pipeline

from cecompile import Answerer, read_questions
from cecompile import device as device_memory
from cecompile.model.checkpoint import DTYPES, load_tokenizer
from cecompile.run import answerer
from cecompile.run.language_model import resolve_device
from cecompile.tasks.chat import NEW_TOKENS, ChatQuestion
from cecompile.workload.chat_tree import graft, prompts_of
from cecompile.workload.sequences import Ints, Sequences

INSTRUCTION = (
    "\nRead the question and answer the following sentence in given multiple choice.\n"
    "Answer only the sentence you chose. Never include a question and other word in your answer.\n"
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]
VOCABULARY = 32_064  # Phi-3's
BATCH_SIZES = {"cpu": (4, 16), "cuda": (8, 16, 32, 64)}


class Forced(LogitsProcessor):
    """Raises the logit of each row's next token on the way to its answer.

    Args:
        answers: per row its tokens, the end token last.
        prompt: padded length of the prompts.
    """

    def __init__(self, answers: Sequence[list[int]], prompt: int) -> None:
        self._answers, self._prompt = answers, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self._prompt
        following = [answer[min(at, len(answer) - 1)] for answer in self._answers]
        scores[torch.arange(len(scores)), following] += 1e4
        return scores


def main() -> None:
    options = _arguments()
    device = resolve_device(options.device)
    if options.memory_limit:
        device_memory.enforce(device, int(options.memory_limit * 1e9))
    model = random_model(SHAPES[options.shape] | {"vocab_size": VOCABULARY}, device, DTYPES[options.dtype])
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [end], tokenizer.pad_token_id

    with tempfile.TemporaryDirectory() as folder:
        full = write_rows(Path(folder) / "full.jsonl", options, tokenizer)
        lines = full.read_text().splitlines(keepends=True)
        sample, count = full, len(lines)
        if options.sample and options.sample < count:
            sample = Path(folder) / "sample.jsonl"
            sample.write_text("".join(lines[i] for i in np.linspace(0, count - 1, options.sample).astype(int)))
        rows = measure(model, tokenizer, full, sample, options)
    print_report(rows, f"{options.shape} {options.dtype}, {count} chat rows on {device}", options)
    if options.output:
        options.output.write_text(json.dumps({"shape": options.shape, "rows": rows}, indent=2) + "\n")


def measure(
    model: PreTrainedModel, tokenizer: Any, full: Path, sample: Path, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Seconds of each way of answering, by name."""
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, data: Path, run: Callable[[Path], dict[str, Any]]) -> None:
        rows[name] = {"items": len(data.read_text().splitlines())} | or_out_of_memory(lambda: run(data))
        print(name, rows[name].get("seconds"), flush=True)

    stock = model.config._attn_implementation
    add("pipeline", sample, lambda data: time_pipeline(model, tokenizer, data))
    sizes = options.batch_sizes or BATCH_SIZES[model.device.type]
    for size in sizes:
        add(f"generate, batch {size}", sample, functools.partial(time_batches, model, tokenizer, size=size))
    best = max(sizes, key=lambda size: rate(rows[f"generate, batch {size}"], "items"))
    if sample is not full:
        add(f"generate, batch {best}, all", full, lambda data: time_batches(model, tokenizer, data, best))
    add("cecompile", full, lambda data: time_ours(model, tokenizer, data, options))
    model.set_attn_implementation(stock)
    return rows


def time_pipeline(model: PreTrainedModel, tokenizer: Any, data: Path) -> dict[str, Any]:
    """The official Section 3."""
    golds = gold_tokens(read_questions(data), tokenizer)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)
    chat = [{"role": "user", "content": "Warm up."}]
    pipe(chat, max_new_tokens=8, do_sample=False, return_full_text=False)
    began = time.perf_counter()
    texts, tokens = [], 0
    for question, gold in zip(read_questions(data), golds, strict=True):
        messages = question.conversation
        length = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        forced = LogitsProcessorList([Forced([gold], length)])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
        texts.append(pipe(messages, logits_processor=forced, **options)[0]["generated_text"])
        tokens += len(gold)
    return _row(began, read_questions(data), texts, tokens)


@torch.inference_mode()
def time_batches(model: PreTrainedModel, tokenizer: Any, data: Path, size: int) -> dict[str, Any]:
    """The same by `generate` on left-padded batches."""
    golds = gold_tokens(read_questions(data), tokenizer)
    began = time.perf_counter()
    questions = read_questions(data)
    bare = [ChatQuestion(q.id, q.messages, q.label) for q in questions]
    prompts = prompts_of(graft(bare, tokenizer, 1 << 20, NEW_TOKENS))
    texts, tokens = [""] * len(questions), 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        longest = len(prompts[batch[0]])
        ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, longest - len(prompts[i]) :] = torch.from_numpy(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=NEW_TOKENS,
            do_sample=False, logits_processor=LogitsProcessorList([Forced([golds[i] for i in batch], longest)]),
        )  # fmt: skip
        for row, i in enumerate(batch):
            texts[i] = tokenizer.decode(out[row, longest:], skip_special_tokens=True)
            tokens += len(golds[i])
    return _row(began, questions, texts, tokens)


def time_ours(model: PreTrainedModel, tokenizer: Any, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same from token trees; warm-up is timed apart, as everywhere."""
    ours = Answerer.from_model(
        model, tokenizer, memory_limit=int(options.memory_limit * 1e9) if options.memory_limit else None,
        tokens_per_bucket=options.tokens_per_bucket, new_tokens=NEW_TOKENS,
    )  # fmt: skip
    questions = read_questions(data)
    golds = gold_tokens(questions, tokenizer)
    likely = answerer.most_likely
    sequences = graft(questions, tokenizer, model.config.max_position_embeddings, NEW_TOKENS)
    answerer.most_likely = lambda staged, readouts: force(sequences, golds, likely(staged, readouts))
    try:
        began = time.perf_counter()
        first = ours.answer(questions)  # compiles and captures
        warmup = time.perf_counter() - began
        began = time.perf_counter()
        answers = ours.answer(read_questions(data)).answers
        tokens = sum(a.tokens or 0 for a in answers)
        row = _row(began, questions, [a.text for a in answers], tokens)
    finally:
        answerer.most_likely = likely
    plan = first.workload.plan
    assert plan is not None
    row |= {"first_run_seconds": warmup, "inference_seconds": first.inference_s[0]}
    row |= {"in_tree": sum(a.decoded_tokens == 0 for a in answers), "note": ours.runtime.mode.note}
    row |= {"useful_tokens": plan.useful_tokens, "slots": plan.slots, "prompt_tokens": plan.unshared_tokens}
    predicted, peak = ours.runtime.planner.predicted_bytes, device_memory.peak(model.device)
    return row | {"predicted_bytes": predicted, "peak_bytes": peak}


def force(sequences: Sequences, golds: Sequence[list[int]], argmax: Ints) -> Ints:
    """Applies the bias to the readouts: on each row's answer its next token, elsewhere the model's own."""
    out, at = argmax.copy(), 0
    for i in range(len(sequences)):
        form = sequences.targets(i)[:-1].tolist()
        gold = golds[int(sequences.questions[i])]
        for j in range(len(form) + 1):
            if form[:j] == gold[:j] and j < len(gold):
                out[at + j] = gold[j]
        at += len(form) + 1
    return out


def gold_tokens(questions: Sequence[ChatQuestion], tokenizer: Any) -> list[list[int]]:
    """Per question the tokens of its right answer as they follow the prompt, and the end token."""
    sequences = graft(questions, tokenizer, 1 << 20, NEW_TOKENS)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    out: list[list[int]] = [[] for _ in questions]
    for i in range(len(sequences)):
        form, number = sequences.targets(i)[:-1].tolist(), int(sequences.questions[i])
        if tokenizer.decode(form).strip() == questions[number].label and not out[number]:
            out[number] = [*form, end]
    return out


def write_rows(path: Path, options: argparse.Namespace, tokenizer: Any) -> Path:
    """The data as chat rows."""
    lines = []
    for question in read_questions(options.data, limit=options.questions):
        asked = f"{INSTRUCTION}\nquestion: {question.context}\nchoices: {list(question.choices)}\n"
        answer = question.choices[question.label or 0]
        lines.append({"message": [{"role": "user", "content": asked}], "answer": answer})
    word = "passage "
    for length in options.long:
        per_word = len(tokenizer(word * 100, add_special_tokens=False)["input_ids"]) / 100
        passage = word * int((length - 100) / per_word)
        asked = f"{INSTRUCTION}\npassage: {passage}\nquestion: is it so\nchoices: [True, False]\n"
        lines.append({"message": [{"role": "user", "content": asked}], "answer": "True"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _row(began: float, questions: Sequence[ChatQuestion], texts: Sequence[str], tokens: int) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    right = sum(t.lstrip().replace("\n", "") == q.label for t, q in zip(texts, questions, strict=True))
    return {"seconds": seconds, "tokens": tokens, "exact_match": right / len(questions)}


def print_report(rows: dict[str, dict[str, Any]], title: str, options: argparse.Namespace) -> None:
    """The table: seconds and tokens per item, and how many times faster ours is."""
    ours = rate(rows["cecompile"], "items")
    title += f", {options.memory_limit:.0f} GB" if options.memory_limit else ""
    columns = numbers("items", "seconds", "s/item", "tokens/item", "exact match", "cecompile is")
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        if row["seconds"] is None:
            table.add_row(name, str(row["items"]), row["failed"])
            continue
        each = row["seconds"] / row["items"]
        cells = (f"{row['seconds']:.2f}", f"{each:.4f}", f"{row['tokens'] / row['items']:.2f}")
        table.add_row(
            name, str(row["items"]), *cells, f"{row['exact_match']:.4f}", f"{ours / rate(row, 'items'):.2f} x"
        )
    Console(width=120).print(table)
    print(json.dumps({k: v for k, v in rows["cecompile"].items() if k != "seconds"}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokenizer", required=True, help="model directory or hub id with a Llama-2 tokenizer")
    parser.add_argument("--data", required=True, help="rows of query, choices and gold")
    parser.add_argument("--questions", type=int, help="the first N; default all")
    parser.add_argument("--long", type=int, nargs="*", default=[], help="prompts of about N tokens, added")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens-per-bucket", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="*")
    parser.add_argument("--sample", type=int, help="rows for what only compares; default all")
    parser.add_argument("--memory-limit", type=float, help="GB")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
