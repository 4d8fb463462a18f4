"""The facts of the pocket world: people, animals, things and opposites, invented or common knowledge.

The other modules of this folder put them into words.
"""

import hashlib
import random
from dataclasses import dataclass

SEED = 20240


def words(text: str) -> list[str]:
    """Return the words of a text that are separated by spaces."""
    return text.split()


NAMES = words("""
Ada Ben Cora Dan Edith Felix Grace Hugo Iris Jack Kate Liam Mona Noah Olive Paul Quinn Rosa Sam Tess
Umar Vera Will Xena Yara Zack Alma Boris Clara David Elsa Frank Gina Henry Ivy James Karen Leo Mary
Nina Otto Pearl Ralph Sara Tom Una Victor Wanda Yusuf Zoe Adam Bella Carl Daisy Eric Fiona George
Helen Ian Julia Kurt Lucy Mark Nora Oscar Paula Rita Simon Tara Uma Vince Wendy Arthur Betty Colin
Dora Ethan Flora Gavin Hazel Isaac Joan Keith Laura Martin Nancy Owen Polly Robert Susan Toby Ursula
Walter Alice Bruno Celia Derek Emma Fred Greta Harry Ida Jonas Kira Lars Mabel Nelson Opal Peter
Ruby Steve Thea Viola Wes Agnes Bill Cathy Dean Ella Floyd Gwen Hans Irma Joel Kelly Lloyd Maya Nick
Olga Phil Rose Scott Tina Vic Willa Amos Beth Clive Donna Eli Faye Glen Holly Ivan Jane Kent Lily
Miles Nell Orson Penny Roy Sally Ted Vicky Wade Anna Bob Chloe Doug
""")

ATTRIBUTES: dict[str, list[str]] = {
    "town": words(
        "Ashford Birchley Coldbrook Dunmore Eastwick Fairhaven Glenrock Hillside Kingsbury Longmead "
        "Marlow Northfield Oakham Stonebridge Westport Redcliff"
    ),
    "job": words(
        "baker doctor farmer teacher painter sailor tailor driver gardener lawyer singer miner "
        "plumber dancer judge butcher"
    ),
    "pet": words("cat dog rabbit parrot hamster turtle goat pony lizard canary goose mouse"),
    "colour": words("red blue green yellow purple orange pink brown black white"),
    "food": words("soup bread cheese rice pasta salad cake pie fish beans honey stew"),
    "hobby": words("chess tennis cards football golf darts hockey rugby bowls cricket"),
}
"""The attributes of a person, and their values."""

SOUNDS = {
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "pig": "oink",
    "cat": "meow",
    "dog": "woof",
    "owl": "hoot",
    "mouse": "squeak",
    "snake": "hiss",
    "lion": "roar",
    "horse": "neigh",
    "bee": "buzz",
    "frog": "croak",
    "crow": "caw",
    "hen": "cluck",
    "donkey": "bray",
    "wolf": "howl",
    "bird": "tweet",
    "goose": "honk",
    "turkey": "gobble",
    "bear": "growl",
    "pony": "snort",
    "goat": "bleat",
    "monkey": "chatter",
}

PLACES = {
    "spoon": "drawer",
    "coat": "closet",
    "milk": "fridge",
    "car": "garage",
    "bed": "bedroom",
    "book": "library",
    "boat": "harbour",
    "train": "station",
    "tent": "forest",
    "plate": "cupboard",
    "letter": "mailbox",
    "bike": "shed",
    "crown": "castle",
    "bell": "tower",
    "sofa": "lounge",
    "plane": "airport",
    "bench": "park",
    "desk": "office",
    "ladder": "barn",
    "shell": "beach",
    "trunk": "attic",
    "barrel": "cellar",
    "stove": "kitchen",
    "towel": "bathroom",
    "chalk": "school",
    "coin": "bank",
    "ticket": "theatre",
    "medicine": "hospital",
    "rose": "garden",
    "bread": "bakery",
    "tractor": "field",
    "candle": "church",
    "flag": "roof",
    "statue": "museum",
    "ring": "box",
    "broom": "hall",
}

COLOURS = {
    "leaf": "green",
    "sky": "blue",
    "snow": "white",
    "coal": "black",
    "banana": "yellow",
    "blood": "red",
    "mud": "brown",
    "carrot": "orange",
    "plum": "purple",
    "ash": "grey",
    "grass": "green",
    "milk": "white",
    "lemon": "yellow",
    "tomato": "red",
    "crow": "black",
    "pig": "pink",
    "bear": "brown",
    "sea": "blue",
    "frog": "green",
    "sun": "yellow",
    "cherry": "red",
    "rice": "white",
    "elephant": "grey",
    "pumpkin": "orange",
}

SIZES = words(
    "ant bee mouse frog bird rat crow duck hen cat goose fox dog sheep goat wolf pig lion donkey horse cow "
    "bear elephant whale"
)
"""Animals from the smallest to the biggest."""

OPPOSITES = [
    tuple(pair.split("-"))
    for pair in words("""
hot-cold big-small tall-short fast-slow happy-sad young-old wet-dry light-dark full-empty
open-closed hard-soft loud-quiet rich-poor strong-weak clean-dirty early-late near-far high-low
thick-thin wide-narrow deep-shallow sharp-blunt rough-smooth sweet-sour good-bad true-false
right-wrong up-down in-out on-off day-night black-white first-last front-back inside-outside
above-below always-never before-after begin-end win-lose push-pull buy-sell give-take come-go
love-hate laugh-cry ask-answer rise-fall wake-sleep find-hide remember-forget brave-afraid
kind-cruel safe-dangerous easy-difficult cheap-expensive tight-loose alive-dead
""")
]

CATEGORIES = {
    "fruits": words("apple pear plum cherry grape lemon peach banana melon orange"),
    "animals": words("cow duck horse lion frog bear goat wolf mouse fox"),
    "colours": words("red blue green yellow purple pink brown black white grey"),
    "tools": words("hammer saw drill axe spade rake broom knife ladder brush"),
    "clothes": words("coat hat scarf shirt sock glove boot dress belt skirt"),
    "drinks": words("milk tea coffee juice water lemonade cocoa cider wine beer"),
    "rooms": words("kitchen bedroom bathroom hall attic cellar office lounge garage library"),
    "toys": words("ball doll kite drum robot puzzle top train swing yoyo"),
}

ADJECTIVES = words("small big young old happy tired hungry quiet clever lazy")
ROOMS = words("kitchen garden garage cellar attic office hall barn shed lounge")
MOVABLES = words("ball book coat hat lamp ring spoon towel broom candle ticket coin letter ladder plate")


@dataclass(frozen=True)
class Person:
    """A name and one value for every attribute."""

    rank: int
    """Position in the Zipf order. The first person is mentioned most."""
    name: str
    facts: dict[str, str]


def _people() -> list[Person]:
    """Draw every person's facts. All values of an attribute are equally frequent."""
    rng = random.Random(SEED)
    names = sorted(NAMES)
    rng.shuffle(names)
    columns: dict[str, list[str]] = {}
    for attribute, values in ATTRIBUTES.items():
        column = [values[i % len(values)] for i in range(len(names))]
        rng.shuffle(column)
        columns[attribute] = column
    return [Person(i, n, {a: c[i] for a, c in columns.items()}) for i, n in enumerate(names)]


PEOPLE = _people()

FACT_SENTENCES = {
    "town": "{name} lives in {value}.",
    "job": "{name} works as a {value}.",
    "pet": "The pet of {name} is a {value}.",
    "colour": "The favourite colour of {name} is {value}.",
    "food": "The favourite food of {name} is {value}.",
    "hobby": "In the evening {name} likes to play {value}.",
}
"""The sentence that answers a question about an attribute."""


def zipf_weight(person: Person) -> float:
    """Relative frequency of a person in the text: a power of the rank."""
    return (person.rank + 3) ** -1.1


def is_bench(key: str) -> bool:
    """Whether an instance is reserved for the benchmarks, as half of them are."""
    return hashlib.sha256(key.encode()).digest()[0] % 2 == 0


def is_bench_fact(person: Person, attribute: str) -> bool:
    """Whether a fact is reserved for the benchmark, as half of every person's and every attribute's are."""
    return (person.rank + list(ATTRIBUTES).index(attribute)) % 2 == 0


def is_bench_pair(index: int) -> bool:
    """Whether the pair of opposites at this index is reserved for the benchmark."""
    return index % 2 == 0


@dataclass(frozen=True)
class Content:
    """A request, the sentence that answers it, and right and wrong alternatives."""

    key: str
    ask: str
    """The request with its punctuation, in lower case."""
    sentence: str
    """The reference answer, with a capital and a full stop."""
    accepted: tuple[str, ...]
    """Other right answers, in lower case without punctuation."""
    wrong: tuple[str, ...]
    """Sentences that answer wrongly."""
    value: str
    """The one word that carries the answer."""
    rivals: tuple[str, ...]
    """Words that would carry a wrong answer."""
    subject: str


def _question(ask: str, sentence: str, subject: str, value: str, values: list[str], short: str) -> Content:
    rivals = tuple(v for v in dict.fromkeys(values) if v != value)
    answer = sentence.format(subject, value)
    plain = answer.rstrip(".").lower()
    accepted = (plain, plain.replace("the ", "a ", 1), short.format(value), value)
    wrong = tuple(sentence.format(subject, v) for v in rivals)
    request = ask.format(subject)
    return Content(request, request, answer, accepted, wrong, value, rivals, subject)


def _questions() -> list[Content]:
    """All questions about sounds, places and colours."""
    sounds, places, colours = (list(d.values()) for d in (SOUNDS, PLACES, COLOURS))
    rows = [
        _question("what does the {} say?", "The {} says {}.", s, v, sounds, "it says {}") for s, v in SOUNDS.items()
    ]
    rows += [
        _question("where is the {}?", "The {} is in the {}.", s, v, places, "it is in the {}")
        for s, v in PLACES.items()
    ]
    rows += [
        _question("what colour is the {}?", "The {} is {}.", s, v, colours, "it is {}") for s, v in COLOURS.items()
    ]
    return rows


QUESTIONS = _questions()


def draw_statement(rng: random.Random) -> Content:
    """Draw something to repeat, such as "say that the old cow is in the barn."."""
    adjective, animal, room = rng.choice(ADJECTIVES), rng.choice(sorted(SOUNDS)), rng.choice(ROOMS)
    clause = f"the {adjective} {animal} is in the {room}"
    others = [r for r in ROOMS if r != room]
    wrong = tuple(f"The {adjective} {animal} is in the {r}." for r in others)
    return Content(
        f"say {clause}", f"say that {clause}.", f"T{clause[1:]}.", (clause,), wrong, room, tuple(others), animal
    )
