"""Makes the embedded demo: a tiny Llama model, its tokenizer, and held-out questions about a made-up town.

    python scripts/train_demo.py --out cecompile/demo

From one seed it writes the text of the small town of Linden Ford, trains a sentencepiece tokenizer and a stock
`LlamaForCausalLM` on it, and prints the scores on questions whose scenes never occur in the training text:

    OUT/model/            config, generation_config, model.safetensors (float32), tokenizer
    OUT/hellaswag.jsonl   HellaSwag's fields; what happens next in a scene
    OUT/chat.jsonl        the 2024 contest's form; the answer is one of the choices, word for word

A scene states a few facts (who trades with whom, what falls into the pond, how far a recipe has got), and each of its
asks has one right ending that follows from them. The wrong endings use the same words, so neither word frequency nor
length gives the answer away. A scene is held out or trained on as a whole, by the hash of its facts.

The committed files are the output for seed 1 and the default steps: 15 minutes on two CPU cores (torch 2.13,
transformers 5.23). Text, questions and tokenizer are the same everywhere; the weights vary with the hardware in their
last digits. Needs torch 2.9 or newer, for Muon.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from cecompile import Answerer, Scorer, evaluate, read_questions
from cecompile.tasks.formats import preprocess
from cecompile.tasks.judge import metrics

TOWN = "Linden Ford"
HELD_OUT_ONE_IN = 5
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

# --- The town -------------------------------------------------------------------------------------------------------


def entries(table: str) -> list[str]:
    return table.split("|")


SHE = entries("Mara|Lena|Nina|Olga|Rosa|Ida|Greta|Vera")
HE = entries("Piet|Tom|Ben|Otto|Emil|Karl|Hugo|Finn")
COLOURS = entries("red|green|blue|white|yellow|black|brown|grey")
NUMBERS = entries("no|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve")
ROOMS = entries("kitchen|garden|cellar|attic|library|stable|pantry|hall")
TOYS = entries("kite|drum|flute|doll|boat|puppet|whistle|ball")
CROPS = entries("plums|pears|figs|lemons|eggs|onions|carrots|turnips")
MAIL = entries("letter|parcel|card|newspaper")
# trade, tool, what is done with the tool
TRADES = [
    ("baker", "rolling pin", "rolls out the dough"),
    ("smith", "hammer", "shapes the hot iron"),
    ("potter", "sponge", "smooths the wet clay"),
    ("tailor", "needle", "mends the torn coat"),
    ("carpenter", "saw", "cuts the long plank"),
    ("gardener", "rake", "clears the fallen leaves"),
    ("painter", "brush", "paints the evening sky"),
    ("fisher", "net", "catches the silver trout"),
    ("barber", "comb", "trims the long beard"),
    ("miller", "scoop", "fills the sacks with flour"),
]
# animal, food, what it does
ANIMALS = [
    ("goat", "hay", "bleats"),
    ("hen", "grain", "clucks"),
    ("pig", "turnips", "grunts"),
    ("dog", "bones", "barks"),
    ("cat", "milk", "purrs"),
    ("horse", "oats", "neighs"),
    ("duck", "barley", "quacks"),
    ("cow", "clover", "moos"),
    ("mouse", "cheese", "squeaks"),
    ("robin", "worms", "sings"),
]
# label, what happens, how one asks, then the fates, each with the things that meet it
MISHAPS = [
    (
        "By the pond",
        "{0} walks over the bridge with {1} and {2}. {He} stumbles, and both of them fall into the pond.",
        "What happens to the {} in the pond?",
        [
            ("floats on the water", "cork|feather|straw hat|wooden spoon"),
            ("sinks to the bottom", "brick|silver coin|iron pan|brass bell"),
            ("swims away in a hurry", "frog|trout|turtle|duck"),
            ("melts away in the water", "lump of sugar|pinch of salt|snowball|lump of ice"),
        ],
    ),
    (
        "On the stairs",
        "{0} carries {1} and {2} up the stairs. {He} stumbles, and both of them fall on the stone floor.",
        "What happens to the {} on the stone floor?",
        [
            ("breaks into many pieces", "glass cup|clay jar|mirror|china plate"),
            ("bounces down the steps", "rubber ball|tennis ball|rubber ring|rubber duck"),
            ("lands without a sound", "feather|wool scarf|pillow|sponge"),
            ("rings loud and clear", "silver coin|tin cup|brass bell|copper key"),
        ],
    ),
    (
        "Near the fire",
        "{0} leaves {1} and {2} too close to the fire. An hour goes by, and the fire burns high.",
        "What happens to the {} near the fire?",
        [
            ("melts into a puddle", "lump of butter|wax candle|snowball|lump of ice"),
            ("bursts into flames", "paper map|dry branch|straw hat|wooden spoon"),
            ("grows too hot to touch", "iron pan|brass bell|brick|copper key"),
            ("wakes up and stretches", "cat|dog|puppy|lamb"),
        ],
    ),
]
# what it is like outside, what one takes along
OUTINGS = [
    ("in pouring rain|under dark rain clouds", "umbrella"),
    ("under a burning sun|in the summer heat", "straw hat"),
    ("in deep snow|on a freezing winter day", "fur coat"),
    ("after midnight|long after sunset", "lantern"),
    ("on muddy roads|through puddles and mud", "rubber boots"),
    ("for a climb in the hills|on a long and stony path", "walking stick"),
]
# goal, materials, steps; {0} is the material, {1} a colour
RECIPES = [
    (
        "make {0} soup in a {1} pot",
        "leek|carrot|onion|bean|turnip|cabbage",
        "Wash the {0} in cold water|Cut the {0} into small pieces|Put the pieces into the {1} pot"
        "|Cover them with water and light the fire|Stir the soup until the {0} is soft|Serve the soup with fresh bread",
    ),
    (
        "cook {0} jam in a {1} pot",
        "plum|cherry|peach|apricot|damson|nectarine",
        "Pick the ripest fruit from the {0} tree|Take out the stones and weigh the fruit"
        "|Cook the fruit with sugar in the {1} pot|Skim the foam off the {0} jam"
        "|Fill the jars while the jam is hot|Close the lids and let the jars cool",
    ),
    (
        "bake a {0} pie in a {1} dish",
        "plum|cherry|leek|onion|pear|fig",
        "Mix flour with butter and a little water|Roll out the dough and line the {1} dish"
        "|Spread the {0} filling over the dough|Cover the filling with a lid of dough"
        "|Bake the {0} pie until it is brown|Let the pie rest before you cut it",
    ),
    (
        "paint a {0} {1}",
        "chair|bench|gate|boat|fence|table",
        "Wash the {0} and let it dry|Rub the wood smooth with sand|Brush a thin coat of {1} paint on the {0}"
        "|Wait one night for the paint to dry|Brush on a second coat of {1} paint|Put the {0} back in its place",
    ),
    (
        "wash a {0} in a {1} tub",
        "coat|shirt|scarf|blanket|dress|jacket",
        "Fill the {1} tub with warm water|Stir a little soap into the water|Press the {0} down under the water"
        "|Wash the {0} until the water is clear|Roll the {0} in a dry towel|Lay the {0} flat on the grass",
    ),
]
OPENINGS = [
    f"It is a quiet morning in {TOWN}.",
    f"It is market day in {TOWN}.",
    "The children are still at school.",
    "A cat sleeps in the sun on the step.",
    "The smell of fresh bread hangs in the street.",
    "The swallows have come back to the roofs.",
]


# --- Scenes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing to ask about a scene: as endings to choose from, and as a question. The right ones come first."""

    lead: str
    subject: str
    endings: list[str]
    question: str
    choices: list[str]


@dataclass(frozen=True, slots=True)
class Scene:
    """`key` names what makes the scene this one, in a fixed order: scenes with equal keys are the same scene."""

    label: str
    facts: str
    key: list[str]
    asks: list[Ask]


Kind = Callable[[random.Random], Scene]


def people(rng: random.Random, count: int) -> list[str]:
    return rng.sample(SHE + HE, count)


def pronoun(name: str) -> str:
    return "she" if name in SHE else "he"


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listing(nouns: list[str]) -> str:
    return ", ".join(nouns[:-1]) + " and " + nouns[-1]


def options(form: str, right: str, pool: list[str]) -> list[str]:
    """The right one and the first three others of the pool, each put into the form."""
    others = [entry for entry in pool if entry != right]
    return [form.format(entry) for entry in [right, *others[:3]]]


def shuffled(rng: random.Random, pool: list[str]) -> list[str]:
    return rng.sample(pool, len(pool))


def working(rng: random.Random) -> Scene:
    names, trades = people(rng, 2), rng.sample(TRADES, 2)
    first, second = rng.sample(trades, 2)
    ways = [f"takes the {tool} and {work}." for _, tool, _ in trades for _, _, work in trades]
    tools = shuffled(rng, [tool for _, tool, _ in TRADES])
    asks = [
        Ask(
            lead=f"The church clock strikes, and {name} gets to work.",
            subject=f"the {trade}",
            endings=options("{}", f"takes the {tool} and {work}.", ways),
            question=f"What does the {trade} need?",
            choices=options(f"the {trade} needs the {{}}", tool, tools),
        )
        for name, (trade, tool, work) in zip(names, trades, strict=True)
    ]
    roles = [f"{name} is the {trade[0]}" for name, trade in zip(names, trades, strict=True)]
    facts = f"{listing(roles)}. On the bench between them lie a {first[1]} and a {second[1]}."
    return Scene("A day at work", facts, sorted(roles), asks)


def following_steps(rng: random.Random) -> Scene:
    recipe = rng.randrange(len(RECIPES))
    goal, materials, steps = RECIPES[recipe]
    material, colour = rng.choice(entries(materials)), rng.choice(COLOURS)
    goal = goal.format(material, colour)
    done = entries(steps.format(material, colour))
    target_device = entries(RECIPES[recipe - 1][2].format(material, colour))
    asks = []
    for count in (2, 3, 4):
        nexts = [done[count], rng.choice(done[:count]), rng.choice(done[count + 1 :]), target_device[count]]
        asks.append(
            Ask(
                lead=f"[header] How to {goal} [title] {done[0]}. [step] {'. '.join(done[1:count])}.",
                subject="",
                endings=[f"{step}." for step in nexts],
                question=f"How do I {goal}? {'. '.join(done[:count])}. What comes next?",
                choices=nexts,
            )
        )
    return Scene("Home and garden", "", [goal], asks)


def mishap(rng: random.Random) -> Scene:
    label, story, question, fates = rng.choice(MISHAPS)
    who = people(rng, 1)[0]
    chosen = rng.sample(fates, 2)
    things = [rng.choice(entries(pool)) for _, pool in chosen]
    ends = [fate for fate, _ in fates]
    lead = rng.choice(["Everybody turns to look.", "A child points and laughs.", "Nobody is there to help."])
    asks = [
        Ask(
            lead=lead,
            subject=f"the {thing}",
            endings=options("{}.", fate, ends),
            question=question.format(thing),
            choices=options(f"the {thing} {{}}", fate, ends),
        )
        for thing, (fate, _) in zip(things, chosen, strict=True)
    ]
    facts = story.format(who, *map(article, things), He=pronoun(who).capitalize())
    return Scene(label, facts, [label, *sorted(things)], asks)


def feeding(rng: random.Random) -> Scene:
    who, animals = people(rng, 1)[0], rng.sample(ANIMALS, 2)
    first, second = rng.sample(animals, 2)
    ways = [f"{noise} and eats the {food}." for _, _, noise in animals for _, food, _ in animals]
    foods = shuffled(rng, [food for _, food, _ in ANIMALS])
    asks = [
        Ask(
            lead=f"{pronoun(who).capitalize()} puts the buckets down and opens the gate.",
            subject=f"the {animal}",
            endings=options("{}", f"{noise} and eats the {food}.", ways),
            question=f"What does the {animal} eat?",
            choices=options(f"the {animal} eats the {{}}", food, foods),
        )
        for animal, food, noise in animals
    ]
    facts = (
        f"A {animals[0][0]} and a {animals[1][0]} wait at the gate. "
        f"{who} has brought a bucket of {first[1]} and a bucket of {second[1]}."
    )
    return Scene("Feeding the animals", facts, [who, *sorted(animal for animal, _, _ in animals)], asks)


def trading(rng: random.Random) -> Scene:
    names, toys = people(rng, 4), rng.sample(TOYS, 4)
    owners = [f"{name} has the {toy}" for name, toy in zip(names, toys, strict=True)]
    asks = []
    for one, two, other in ((0, 1, 2), (2, 3, 0)):
        deals = [f"{names[owner]} for the {toys[toy]}" for owner in (two, other) for toy in (two, one)]
        asks.append(
            Ask(
                lead="Both of them are happy with the trade.",
                subject=names[one],
                endings=options("thanks {}.", deals[0], deals),
                question=f"Whom does {names[one]} thank?",
                choices=options(f"{names[one]} thanks {{}}", deals[0], deals),
            )
        )
    trades = f"{names[0]} trades with {names[1]}, and {names[2]} trades with {names[3]}."
    return Scene("Trading at the fair", f"{listing(owners)}. {trades}", [*sorted(owners), trades], asks)


def counting(rng: random.Random) -> Scene:
    name, crop = people(rng, 1)[0], rng.choice(CROPS)
    start, change, more = rng.randint(5, 9), rng.randint(1, 3), rng.random() < 0.5
    total = start + change if more else start - change
    act = f"finds {NUMBERS[change]} more" if more else f"gives {NUMBERS[change]} away"
    facts = f"{name} has {NUMBERS[start]} {crop} and {act}."
    near = shuffled(rng, NUMBERS[max(2, total - 3) : total + 4])
    ask = Ask(
        lead=f"Then {pronoun(name)} sits down on the wall.",
        subject=name,
        endings=options(f"counts {{}} {crop}.", NUMBERS[total], near),
        question=f"How many {crop} does {name} have now?",
        choices=options(f"{name} has {{}} {crop}", NUMBERS[total], near),
    )
    return Scene("Counting the harvest", facts, [facts], [ask])


def going_out(rng: random.Random) -> Scene:
    names, outings = people(rng, 2), rng.sample(OUTINGS, 4)
    items = shuffled(rng, [item for _, item in outings])
    when = [rng.choice(entries(weather)) for weather, _ in outings[:2]]
    plans = [f"{name} walks {weather}" for name, weather in zip(names, when, strict=True)]
    asks = []
    for name, weather, (_, item), other in zip(names, when, outings, reversed(when), strict=False):
        ways = [f"{sky} with the {thing}" for sky in (weather, other) for thing in (item, items[items[0] == item])]
        asks.append(
            Ask(
                lead="Each of them takes one thing from the hall.",
                subject=name,
                endings=options("walks {}.", ways[0], ways),
                question=f"How does {name} go out?",
                choices=options(f"{name} walks {{}}", ways[0], ways),
            )
        )
    hall = listing([item if item.endswith("s") else article(item) for item in items])
    facts = f"In the hall there are {hall}. {plans[0]}, and {plans[1]}."
    return Scene("Going out", facts, sorted(plans), asks)


def delivering(rng: random.Random) -> Scene:
    names, rooms, mail = people(rng, 4), rng.sample(ROOMS, 4), rng.sample(MAIL, 2)
    whereabouts = [f"{name} is in the {room}" for name, room in zip(names, rooms, strict=True)]
    asks = []
    for one, two, other in ((0, 1, 2), (2, 3, 0)):
        calls = [f"{names[owner]} in the {rooms[room]}" for owner in (two, other) for room in (two, one)]
        asks.append(
            Ask(
                lead="Both of them set out at once.",
                subject=names[one],
                endings=options("looks for {}.", calls[0], calls),
                question=f"Where does {names[one]} go?",
                choices=options(f"{names[one]} looks for {{}}", calls[0], calls),
            )
        )
    post = f"{names[0]} has a {mail[0]} for {names[1]}, and {names[2]} has a {mail[1]} for {names[3]}."
    return Scene("Delivering the post", f"{listing(whereabouts)}. {post}", [*sorted(whereabouts), post], asks)


KINDS: list[Kind] = [working, following_steps, mishap, feeding, trading, counting, going_out, delivering]


def name_of(scene: Scene) -> str:
    return "|".join(scene.key)


def scenes(rng: random.Random, kind: Kind, held_out: bool) -> Iterator[Scene]:
    """Endless scenes of one kind, of one side of the split."""
    while True:
        scene = kind(rng)
        digest = hashlib.sha256(name_of(scene).encode()).digest()
        if (digest[0] % HELD_OUT_ONE_IN == 0) == held_out:
            yield scene


def new_scenes(rng: random.Random, kind: Kind, seen: set[str], count: int) -> list[Scene]:
    """Held-out scenes whose names are not in `seen` yet; adds them."""
    found: list[Scene] = []
    for scene in scenes(rng, kind, held_out=True):
        if len(found) == count:
            break
        if name_of(scene) not in seen:
            seen.add(name_of(scene))
            found.append(scene)
    return found


# --- From a scene to questions, and to text -------------------------------------------------------------------------


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


def query_of(row: dict[str, Any]) -> str:
    return preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


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
    rows = [
        chat_row(rng, scene, rng.choice(scene.asks))
        for kind in KINDS
        for scene in new_scenes(rng, kind, seen, CHATS_PER_KIND)
    ]
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
    parts = [(query_of(hellaswag_row(rng, scene, first, opening)), False), (f" {preprocess(first.endings[0])}", True)]
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


# --- Tokenizer ------------------------------------------------------------------------------------------------------


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
    return [
        (piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def encode(tokenizer: Any, texts: list[Text]) -> list[tuple[list[int], list[float]]]:
    """Token ids and the share of each that is learnt, a pair a text, the shortest text first."""
    encoded = []
    for chat in sorted({text.chat for text in texts}):
        chosen = [text for text in texts if text.chat == chat]
        batch = tokenizer(list(map(str, chosen)), add_special_tokens=not chat, return_offsets_mapping=True)
        for text, ids, offsets in zip(chosen, batch["input_ids"], batch["offset_mapping"], strict=True):
            share_of = [1.0 if follows else CONTEXT_SHARE for part, follows in text.parts for _ in part]
            shares = [share_of[start] for start, _ in offsets]
            ending = [] if chat else [tokenizer.eos_token_id]
            encoded.append((ids + ending, shares + [1.0] * len(ending)))
    return sorted(encoded, key=lambda entry: len(entry[0]))


# --- Training -------------------------------------------------------------------------------------------------------


def new_model(tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@dataclass(frozen=True, slots=True)
class Corpus:
    """`ids`: (texts, longest) int16, padded on the right, in order of length; `shares`: (texts, longest) float16."""

    ids: torch.Tensor
    shares: torch.Tensor
    lengths: list[int]


def build_corpus(tokenizer: Any, texts: list[Text], device: torch.device) -> Corpus:
    encoded = encode(tokenizer, texts)
    longest = len(encoded[-1][0])
    ids = np.full((len(encoded), longest), tokenizer.pad_token_id, dtype=np.int16)
    shares = np.zeros((len(encoded), longest), dtype=np.float16)
    for row, (tokens, share) in enumerate(encoded):
        ids[row, : len(tokens)] = tokens
        shares[row, : len(tokens)] = share
    lengths = [len(tokens) for tokens, _ in encoded]
    return Corpus(torch.from_numpy(ids).to(device), torch.from_numpy(shares).to(device), lengths)


def batches(corpus: Corpus, rng: random.Random, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (BATCH, length) and shares of the same shape; the texts of a batch are about equally long."""
    starts: list[int] = []
    for _ in range(steps):
        if not starts:
            shift = rng.randrange(BATCH)
            starts = list(range(shift, len(corpus.lengths) - BATCH + 1, BATCH))
            rng.shuffle(starts)
        rows = slice(start := starts.pop(), start + BATCH)
        length = corpus.lengths[start + BATCH - 1]
        yield corpus.ids[rows, :length].long(), corpus.shares[rows, :length].float()


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


def learning_rate(step: int, steps: int) -> float:
    rise, fall = (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps)
    return LEARNING_RATE * min(1.0, rise, fall)


def train(model: Any, corpus: Corpus, steps: int, seed: int) -> None:
    began = time.perf_counter()
    optimizers = optimizers_of(model)
    model.train()
    for step, (ids, shares) in enumerate(batches(corpus, random.Random(f"batches {seed}"), steps)):
        loss = next_token_loss(model, ids, shares)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 500 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    model.eval()


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.cpu().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)


# --- Held-out scores ------------------------------------------------------------------------------------------------


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


# --- Command line ---------------------------------------------------------------------------------------------------


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
    corpus = build_corpus(tokenizer, texts, device)
    print(f"{len(texts)} texts, {sum(corpus.lengths)} tokens, {time.perf_counter() - began:.0f} s", flush=True)

    model = new_model(tokenizer).to(device)
    train(model, corpus, arguments.steps, arguments.seed)
    save_model(model, tokenizer, directory)
    print(f"{model.num_parameters()} parameters, trained on {device} after {time.perf_counter() - began:.0f} s")

    torch.set_float32_matmul_precision("highest")
    print_scores(arguments.out)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
