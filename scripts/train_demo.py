"""Makes the embedded demo: a tiny Llama model, its tokenizer, and held-out questions about a made-up town.

    python scripts/train_demo.py --out cecompile/demo

From one seed it writes the text of the small town of Linden Ford, trains a sentencepiece tokenizer and a stock
`LlamaForCausalLM` on it, and prints the scores on questions whose scenes never occur in the training text:

    OUT/model/            config, generation_config, model.safetensors (float32), tokenizer
    OUT/hellaswag.jsonl   HellaSwag's fields; what happens next in a scene
    OUT/chat.jsonl        the 2024 contest's form; the answer is one of the choices, word for word

The committed files are the output for seed 1 and the default steps: 15 minutes on two CPU cores (torch 2.13,
transformers 5.23). Text, questions and tokenizer are the same everywhere; the weights vary with the hardware in their
last digits. Needs torch 2.9 or newer, for Muon.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from demo_town import KINDS, OPENINGS, Ask, Scene, name_of, new_scenes, scenes, shuffled
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from cecompile import Answerer, Scorer, evaluate, read_questions
from cecompile.tasks.formats import preprocess
from cecompile.tasks.judge import metrics

Encoded = tuple[torch.Tensor, torch.Tensor]
TRAINING_TEXTS = 145_000
TOKENIZER_TEXTS = 20_000
SCENES_PER_KIND = 20
CHATS_PER_KIND = 10
CHAT_SHARE = 0.35
VOCABULARY = 1024
POSITIONS = 1024
BATCH = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.4
# The facts of a scene follow from nothing: only this share of their tokens is learnt.
CONTEXT_SHARE = 0.05

PAD, END = "<pad>", "<|end|>"
MARKERS = ["<|system|>", "<|user|>", "<|assistant|>", END]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INSTRUCTIONS = [
    "Read the question and choose the answer that fits.\nWrite only that choice, word for word.",
    "Here is a question about the town of Linden Ford.\nReply with the right choice and nothing else.",
    "Answer the question with one of the choices.\nDo not repeat the question and do not add a word.",
]


def context(scene: Scene, opening: str, lead: str) -> str:
    return " ".join(part for part in (opening, scene.facts, lead) if part)


def hellaswag_row(rng: random.Random, scene: Scene, ask: Ask, opening: str) -> dict[str, Any]:
    endings = shuffled(rng, ask.endings)
    ctx_a = context(scene, opening, ask.lead)
    return {
        "activity_label": scene.label, "ctx_a": ctx_a, "ctx_b": ask.subject, "ctx": f"{ctx_a} {ask.subject}".strip(),
        "endings": endings, "label": endings.index(ask.endings[0]), "split": "val",
    }  # fmt: skip


def chat_row(rng: random.Random, scene: Scene, ask: Ask) -> dict[str, Any]:
    question = context(scene, "", ask.question)
    content = f"\n{rng.choice(INSTRUCTIONS)}\n\nquestion: {question}\nchoices: {shuffled(rng, ask.choices)}\n"
    return {"message": [{"role": "user", "content": content}], "answer": ask.choices[0]}


def openings(rng: random.Random, scene: Scene) -> str:
    return " ".join(rng.sample(OPENINGS, rng.choice([0, 0, 1, 1, 2]))) if scene.facts else ""


def held_out_questions(seed: int, seen: set[str]) -> list[dict[str, Any]]:
    """The questions of a scene stand together and start alike. Adds the names of the scenes to `seen`."""
    rng = random.Random(f"questions {seed}")
    groups = []
    for kind in KINDS:
        for scene in new_scenes(rng, kind, seen, SCENES_PER_KIND):
            opening = openings(rng, scene)
            groups.append([hellaswag_row(rng, scene, ask, opening) for ask in scene.asks])
    rng.shuffle(groups)
    return [{"ind": ind, **row} for ind, row in enumerate(row for group in groups for row in group)]


def held_out_chats(seed: int, seen: set[str]) -> list[dict[str, Any]]:
    """One row a scene, of scenes that are not in `seen`; adds their names to it."""
    rng = random.Random(f"chats {seed}")
    chosen = (scene for kind in KINDS for scene in new_scenes(rng, kind, seen, CHATS_PER_KIND))
    rows = [chat_row(rng, scene, rng.choice(scene.asks)) for scene in chosen]
    rng.shuffle(rows)
    return rows


@dataclass(frozen=True, slots=True)
class Text:
    """A training text in parts; True marks those that follow from what stands before them.

    `chat` texts carry their own special tokens.
    """

    parts: list[tuple[str, bool]]
    chat: bool

    def __str__(self) -> str:
        return "".join(part for part, _ in self.parts)


def story(rng: random.Random, scene: Scene) -> Text:
    """The asks of a scene, one after another, the first exactly as it is scored. A recipe asks only once."""
    opening = openings(rng, scene)
    first, *rest = rng.sample(scene.asks, len(scene.asks))
    row = hellaswag_row(rng, scene, first, opening)
    query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    parts = [(query, False), (f" {preprocess(first.endings[0])}", True)]
    for ask in rest if scene.facts else []:
        parts += [(f" {ask.lead} {ask.subject.capitalize()}", False), (f" {ask.endings[0]}", True)]
    return Text(parts, chat=False)


def dialogue(rng: random.Random, scene: Scene) -> Text:
    row = chat_row(rng, scene, rng.choice(scene.asks))
    prompt = f"<s><|user|>\n{row['message'][0]['content']}{END}\n<|assistant|>\n"
    return Text([(prompt, False), (f"{row['answer']}{END}", True)], chat=True)


def training_texts(seed: int, count: int, held_out: set[str]) -> list[Text]:
    rng = random.Random(f"training {seed}")
    sources = [scenes(rng, kind, held_out=False) for kind in KINDS]
    texts = []
    for number in range(count):
        scene = next(sources[number % len(KINDS)])
        assert name_of(scene) not in held_out
        texts.append(dialogue(rng, scene) if rng.random() < CHAT_SHARE else story(rng, scene))
    return texts


def assert_held_out(texts: list[Text], questions: list[dict[str, Any]], chats: list[dict[str, Any]]) -> None:
    """No context of a held-out question, and no held-out chat question, occurs anywhere in the training text."""
    corpus = "\n\n".join(map(str, texts))
    for row in questions:
        assert preprocess(row["ctx_a"]) not in corpus, row
    for row in chats:
        asked = row["message"][0]["content"].split("question: ")[1].split("\nchoices")[0]
        assert asked not in corpus, row


def train_tokenizer(texts: list[Text], directory: Path) -> Any:
    """Trains the sentencepiece model, and writes it together with the same tokenizer in transformers' form."""
    directory.mkdir(parents=True, exist_ok=True)
    model = directory / "tokenizer.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(re.sub(r"<[^>]*>", "", str(text)) for text in texts),
            model_writer=file, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True, character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=3, pad_piece=PAD,
            control_symbols=MARKERS, num_threads=1, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(index): index for index in range(len(pieces))}
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges_of(vocab), pad_token=PAD, additional_special_tokens=MARKERS,
        chat_template=CHAT_TEMPLATE, model_max_length=POSITIONS, add_bos_token=True,
    )  # fmt: skip
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    return AutoTokenizer.from_pretrained(directory)


def merges_of(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to build a piece from two others, in the order in which sentencepiece learnt the pieces."""
    splits = ((piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece)))
    return [split for split in splits if vocab.keys() >= set(split)]


def encode(tokenizer: Any, texts: list[Text]) -> list[Encoded]:
    """Token ids (int16) and the share of each that is learnt (float16), a pair a text, the shortest text first."""
    encoded = []
    for chat in sorted({text.chat for text in texts}):
        chosen = [text for text in texts if text.chat == chat]
        batch = tokenizer(list(map(str, chosen)), add_special_tokens=not chat, return_offsets_mapping=True)
        for text, ids, offsets in zip(chosen, batch["input_ids"], batch["offset_mapping"], strict=True):
            share_of = [1.0 if follows else CONTEXT_SHARE for part, follows in text.parts for _ in part]
            ending = [] if chat else [tokenizer.eos_token_id]
            shares = [share_of[start] for start, _ in offsets] + [1.0] * len(ending)
            encoded.append((torch.tensor(ids + ending).short(), torch.tensor(shares).half()))
    return sorted(encoded, key=lambda entry: len(entry[0]))


def new_model(tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(encoded: list[Encoded], pad: int, rng: random.Random, steps: int) -> Iterator[Encoded]:
    """Token ids (BATCH, length) and shares of the same shape; the texts of a batch are about equally long."""
    starts: list[int] = []
    for _ in range(steps):
        if not starts:
            starts = list(range(rng.randrange(BATCH), len(encoded) - BATCH + 1, BATCH))
            rng.shuffle(starts)
        start = starts.pop()
        ids, shares = map(list, zip(*encoded[start : start + BATCH], strict=True))
        yield pad_sequence(ids, True, pad).long(), pad_sequence(shares, True, 0).float()


def next_token_loss(model: Any, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross entropy at positions drawn by their shares; the vocabulary is computed at those positions alone."""
    chosen = torch.rand(shares[:, 1:].shape, device=ids.device) < shares[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return functional.cross_entropy(model.lm_head(hidden[:, :-1][chosen]), ids[:, 1:][chosen])


def optimizers_of(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (rest if parameter.ndim < 2 or "embed" in name else matrices).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: Any, encoded: list[Encoded], steps: int, seed: int) -> None:
    began = time.perf_counter()
    optimizers = optimizers_of(model)
    model.train()
    drawn = batches(encoded, model.config.pad_token_id, random.Random(f"batches {seed}"), steps)
    for step, (ids, shares) in enumerate(drawn):
        loss = next_token_loss(model, ids.to(model.device), shares.to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rise, fall = (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, rise, fall)
            optimizer.step()
            optimizer.zero_grad()
        if step % 500 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    model.eval()


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    ends = [tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.cpu().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)


def print_scores(demo: Path) -> None:
    """Scores the saved model on both sets of held-out questions with the stock model alone."""
    scorer = Scorer.from_pretrained(demo / "model", engine="reference")
    rows = [json.loads(line) for line in (demo / "hellaswag.jsonl").read_text(encoding="utf-8").splitlines()]
    samples: dict[str, list[Any]] = defaultdict(list)
    for row, sample in zip(rows, evaluate(scorer, read_questions(demo / "hellaswag.jsonl")).samples, strict=True):
        samples[row["activity_label"]].append(sample)
    every = [sample for group in samples.values() for sample in group]
    for label, group in [*sorted(samples.items()), ("all", every)]:
        values = metrics(group)
        shown = f"acc {values['acc']:.4f}  acc_norm {values['acc_norm']:.4f}"
        print(f"hellaswag  {label:22s} {len(group):4d} questions  {shown}")
    answerer = Answerer.from_pretrained(demo / "model", engine="reference", new_tokens=40)
    questions = read_questions(demo / "chat.jsonl")
    answers = [answer.text.lstrip().replace("\n", "") for answer in answerer.answer(questions).answers]
    exact = np.mean([text == question.label for text, question in zip(answers, questions, strict=True)])
    verbatim = np.mean([text in question.choices for text, question in zip(answers, questions, strict=True)])
    print(f"chat  {len(questions)} rows  exact match {exact:.4f}  one of the choices {verbatim:.4f}")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the demo")
    parser.add_argument("--seed", type=int, default=1, help="of the text, the weights and the order of training")
    parser.add_argument("--steps", type=int, default=4500, help="training steps")
    parser.add_argument("--texts", type=int, default=TRAINING_TEXTS, help="training texts")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    directory = arguments.out / "model"
    shutil.rmtree(directory, ignore_errors=True)

    held_out: set[str] = set()
    questions = held_out_questions(arguments.seed, held_out)
    chats = held_out_chats(arguments.seed, held_out)
    texts = training_texts(arguments.seed, arguments.texts, held_out)
    assert_held_out(texts, questions, chats)
    tokenizer = train_tokenizer(texts[:TOKENIZER_TEXTS], directory)
    write_jsonl(arguments.out / "hellaswag.jsonl", questions)
    write_jsonl(arguments.out / "chat.jsonl", chats)
    encoded = encode(tokenizer, texts)
    tokens = sum(len(ids) for ids, _ in encoded)
    print(f"{len(texts)} texts, {tokens} tokens, {time.perf_counter() - began:.0f} s", flush=True)

    model = new_model(tokenizer).to(device)
    train(model, encoded, arguments.steps, arguments.seed)
    save_model(model, tokenizer, directory)
    print(f"{model.num_parameters()} parameters, trained on {device} after {time.perf_counter() - began:.0f} s")

    torch.set_float32_matmul_precision("highest")
    print_scores(arguments.out)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
