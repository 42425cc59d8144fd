"""The small town of Linden Ford, which the embedded demo's texts and questions are about.

A scene states a few facts (who trades with whom, what falls into the pond, how far a recipe has got), and each of its
asks has one right ending that follows from them. The wrong endings use the same words, so neither word frequency nor
length gives the answer away. A scene is held out or trained on as a whole, by the hash of its facts.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TOWN = "Linden Ford"
HELD_OUT_ONE_IN = 5


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
    ("baker", "rolling pin", "rolls out the dough"), ("smith", "hammer", "shapes the hot iron"),
    ("potter", "sponge", "smooths the wet clay"), ("tailor", "needle", "mends the torn coat"),
    ("carpenter", "saw", "cuts the long plank"), ("gardener", "rake", "clears the fallen leaves"),
    ("painter", "brush", "paints the evening sky"), ("fisher", "net", "catches the silver trout"),
    ("barber", "comb", "trims the long beard"), ("miller", "scoop", "fills the sacks with flour"),
]  # fmt: skip
# animal, what it does, food
ANIMALS = [
    ("goat", "bleats", "hay"), ("hen", "clucks", "grain"), ("pig", "grunts", "turnips"), ("dog", "barks", "bones"),
    ("cat", "purrs", "milk"), ("horse", "neighs", "oats"), ("duck", "quacks", "barley"), ("cow", "moos", "clover"),
    ("mouse", "squeaks", "cheese"), ("robin", "sings", "worms"),
]  # fmt: skip
# label, what happens, how one asks, then the fates, each with the things that meet it
MISHAPS = [
    ("By the pond",
     "{0} walks over the bridge with {1} and {2}. {He} stumbles, and both of them fall into the pond.",
     "What happens to the {} in the pond?",
     {"floats on the water": "cork|feather|straw hat|wooden spoon",
      "sinks to the bottom": "brick|silver coin|iron pan|brass bell",
      "swims away in a hurry": "frog|trout|turtle|duck",
      "melts away in the water": "lump of sugar|pinch of salt|snowball|lump of ice"}),
    ("On the stairs",
     "{0} carries {1} and {2} up the stairs. {He} stumbles, and both of them fall on the stone floor.",
     "What happens to the {} on the stone floor?",
     {"breaks into many pieces": "glass cup|clay jar|mirror|china plate",
      "bounces down the steps": "rubber ball|tennis ball|rubber ring|rubber duck",
      "lands without a sound": "feather|wool scarf|pillow|sponge",
      "rings loud and clear": "silver coin|tin cup|brass bell|copper key"}),
    ("Near the fire",
     "{0} leaves {1} and {2} too close to the fire. An hour goes by, and the fire burns high.",
     "What happens to the {} near the fire?",
     {"melts into a puddle": "lump of butter|wax candle|snowball|lump of ice",
      "bursts into flames": "paper map|dry branch|straw hat|wooden spoon",
      "grows too hot to touch": "iron pan|brass bell|brick|copper key",
      "wakes up and stretches": "cat|dog|puppy|lamb"}),
]  # fmt: skip
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
    ("make {0} soup in a {1} pot", "leek|carrot|onion|bean|turnip|cabbage",
     "Wash the {0} in cold water|Cut the {0} into small pieces|Put the pieces into the {1} pot"
     "|Cover them with water and light the fire|Stir the soup until the {0} is soft|Serve the soup with fresh bread"),
    ("cook {0} jam in a {1} pot", "plum|cherry|peach|apricot|damson|nectarine",
     "Pick the ripest fruit from the {0} tree|Take out the stones and weigh the fruit"
     "|Cook the fruit with sugar in the {1} pot|Skim the foam off the {0} jam"
     "|Fill the jars while the jam is hot|Close the lids and let the jars cool"),
    ("bake a {0} pie in a {1} dish", "plum|cherry|leek|onion|pear|fig",
     "Mix flour with butter and a little water|Roll out the dough and line the {1} dish"
     "|Spread the {0} filling over the dough|Cover the filling with a lid of dough"
     "|Bake the {0} pie until it is brown|Let the pie rest before you cut it"),
    ("paint a {0} {1}", "chair|bench|gate|boat|fence|table",
     "Wash the {0} and let it dry|Rub the wood smooth with sand|Brush a thin coat of {1} paint on the {0}"
     "|Wait one night for the paint to dry|Brush on a second coat of {1} paint|Put the {0} back in its place"),
    ("wash a {0} in a {1} tub", "coat|shirt|scarf|blanket|dress|jacket",
     "Fill the {1} tub with warm water|Stir a little soap into the water|Press the {0} down under the water"
     "|Wash the {0} until the water is clear|Roll the {0} in a dry towel|Lay the {0} flat on the grass"),
]  # fmt: skip
OPENINGS = [
    f"It is a quiet morning in {TOWN}.",
    f"It is market day in {TOWN}.",
    "The children are still at school.",
    "A cat sleeps in the sun on the step.",
    "The smell of fresh bread hangs in the street.",
    "The swallows have come back to the roofs.",
]


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


def ask(lead: str, subject: str, question: str, right: str, pool: list[str], ending: str, choice: str) -> Ask:
    """Asks for one of the pool, in the form of an ending and in the form of a choice."""
    return Ask(lead, subject, options(ending, right, pool), question, options(choice, right, pool))


def shuffled(rng: random.Random, pool: list[str]) -> list[str]:
    return rng.sample(pool, len(pool))


def matching(
    rng: random.Random, pair: list[tuple[str, str, str]], leads: list[str], things: list[str], thing: int,
    ending: str, question: str, choice: str,
) -> list[Ask]:  # fmt: skip
    """Asks about each of two entries of a table, `thing` being the column to choose from; ways are mixed from both."""
    ways = [ending.format(one, other) for _, one, _ in pair for _, _, other in pair]
    pool = shuffled(rng, things)
    return [
        Ask(lead, f"the {entry[0]}", options("{}", ending.format(*entry[1:]), ways), question.format(entry[0]),
            options(choice.format(entry[0]), entry[thing], pool))
        for lead, entry in zip(leads, pair, strict=True)
    ]  # fmt: skip


def exchanges(lead: str, names: list[str], things: list[str], verb: str, way: str, question: str) -> list[Ask]:
    """Asks about the first and the third of four people, each of whom turns to the next one, owner of a thing."""
    asks = []
    for one, two, other in ((0, 1, 2), (2, 3, 0)):
        ways = [way.format(names[owner], things[thing]) for owner in (two, other) for thing in (two, one)]
        forms = (f"{verb} {{}}.", f"{names[one]} {verb} {{}}")
        asks.append(ask(lead, names[one], question.format(names[one]), ways[0], ways, *forms))
    return asks


def working(rng: random.Random) -> Scene:
    names, trades = people(rng, 2), rng.sample(TRADES, 2)
    first, second = rng.sample(trades, 2)
    leads = [f"The church clock strikes, and {name} gets to work." for name in names]
    forms = ("takes the {} and {}.", "What does the {} need?", "the {} needs the {{}}")
    asks = matching(rng, trades, leads, [tool for _, tool, _ in TRADES], 1, *forms)
    roles = [f"{name} is the {trade[0]}" for name, trade in zip(names, trades, strict=True)]
    facts = f"{listing(roles)}. On the bench between them lie a {first[1]} and a {second[1]}."
    return Scene("A day at work", facts, sorted(roles), asks)


def following_steps(rng: random.Random) -> Scene:
    recipe = rng.randrange(len(RECIPES))
    goal, materials, steps = RECIPES[recipe]
    material, colour = rng.choice(entries(materials)), rng.choice(COLOURS)
    goal = goal.format(material, colour)
    done = entries(steps.format(material, colour))
    elsewhere = entries(RECIPES[recipe - 1][2].format(material, colour))
    asks = []
    for count in (2, 3, 4):
        nexts = [done[count], rng.choice(done[:count]), rng.choice(done[count + 1 :]), elsewhere[count]]
        lead = f"[header] How to {goal} [title] {done[0]}. [step] {'. '.join(done[1:count])}."
        question = f"How do I {goal}? {'. '.join(done[:count])}. What comes next?"
        asks.append(Ask(lead, "", [f"{step}." for step in nexts], question, nexts))
    return Scene("Home and garden", "", [goal], asks)


def mishap(rng: random.Random) -> Scene:
    label, story, question, fates = rng.choice(MISHAPS)
    who = people(rng, 1)[0]
    chosen = rng.sample(list(fates.items()), 2)
    things = [rng.choice(entries(pool)) for _, pool in chosen]
    lead = rng.choice(["Everybody turns to look.", "A child points and laughs.", "Nobody is there to help."])
    asks = [
        ask(lead, f"the {thing}", question.format(thing), fate, list(fates), "{}.", f"the {thing} {{}}")
        for thing, (fate, _) in zip(things, chosen, strict=True)
    ]
    facts = story.format(who, *map(article, things), He=pronoun(who).capitalize())
    return Scene(label, facts, [label, *sorted(things)], asks)


def feeding(rng: random.Random) -> Scene:
    who, animals = people(rng, 1)[0], rng.sample(ANIMALS, 2)
    first, second = rng.sample(animals, 2)
    leads = [f"{pronoun(who).capitalize()} puts the buckets down and opens the gate."] * 2
    forms = ("{} and eats the {}.", "What does the {} eat?", "the {} eats the {{}}")
    asks = matching(rng, animals, leads, [food for _, _, food in ANIMALS], 2, *forms)
    facts = f"A {animals[0][0]} and a {animals[1][0]} wait at the gate. {who} has brought "
    facts += f"a bucket of {first[2]} and a bucket of {second[2]}."
    return Scene("Feeding the animals", facts, [who, *sorted(animal for animal, _, _ in animals)], asks)


def trading(rng: random.Random) -> Scene:
    names, toys = people(rng, 4), rng.sample(TOYS, 4)
    owners = [f"{name} has the {toy}" for name, toy in zip(names, toys, strict=True)]
    lead = "Both of them are happy with the trade."
    asks = exchanges(lead, names, toys, "thanks", "{} for the {}", "Whom does {} thank?")
    trades = f"{names[0]} trades with {names[1]}, and {names[2]} trades with {names[3]}."
    return Scene("Trading at the fair", f"{listing(owners)}. {trades}", [*sorted(owners), trades], asks)


def counting(rng: random.Random) -> Scene:
    name, crop = people(rng, 1)[0], rng.choice(CROPS)
    start, change, more = rng.randint(5, 9), rng.randint(1, 3), rng.random() < 0.5
    total = start + change if more else start - change
    act = f"finds {NUMBERS[change]} more" if more else f"gives {NUMBERS[change]} away"
    facts = f"{name} has {NUMBERS[start]} {crop} and {act}."
    near = shuffled(rng, NUMBERS[max(2, total - 3) : total + 4])
    lead, question = f"Then {pronoun(name)} sits down on the wall.", f"How many {crop} does {name} have now?"
    forms = (f"counts {{}} {crop}.", f"{name} has {{}} {crop}")
    return Scene("Counting the harvest", facts, [facts], [ask(lead, name, question, NUMBERS[total], near, *forms)])


def going_out(rng: random.Random) -> Scene:
    names, outings = people(rng, 2), rng.sample(OUTINGS, 4)
    items = shuffled(rng, [item for _, item in outings])
    when = [rng.choice(entries(weather)) for weather, _ in outings[:2]]
    plans = [f"{name} walks {weather}" for name, weather in zip(names, when, strict=True)]
    asks = []
    for name, weather, (_, item), other in zip(names, when, outings, reversed(when), strict=False):
        ways = [f"{sky} with the {thing}" for sky in (weather, other) for thing in (item, items[items[0] == item])]
        forms, question = ("walks {}.", f"{name} walks {{}}"), f"How does {name} go out?"
        asks.append(ask("Each of them takes one thing from the hall.", name, question, ways[0], ways, *forms))
    hall = listing([item if item.endswith("s") else article(item) for item in items])
    facts = f"In the hall there are {hall}. {plans[0]}, and {plans[1]}."
    return Scene("Going out", facts, sorted(plans), asks)


def delivering(rng: random.Random) -> Scene:
    names, rooms, mail = people(rng, 4), rng.sample(ROOMS, 4), rng.sample(MAIL, 2)
    whereabouts = [f"{name} is in the {room}" for name, room in zip(names, rooms, strict=True)]
    asks = exchanges("Both of them set out at once.", names, rooms, "looks for", "{} in the {}", "Where does {} go?")
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
