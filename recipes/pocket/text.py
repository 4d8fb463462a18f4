"""The pretraining text: short passages about the people, the things and the words of the pocket world.

It states every fact in several wordings. It contains no wording of an instruction and no puzzle of a benchmark.
"""

import random
from collections.abc import Callable

from constraints import CONSTRAINTS, lower_first
from skills import SKILLS, Instance
from world import (
    ADJECTIVES,
    ATTRIBUTES,
    CATEGORIES,
    COLOURS,
    FACT_SENTENCES,
    OPPOSITES,
    PEOPLE,
    PLACES,
    ROOMS,
    SIZES,
    SOUNDS,
    Person,
    is_bench_fact,
    zipf_weight,
)

SPELLED = sorted(
    {*ADJECTIVES, *ROOMS, *SOUNDS, *SOUNDS.values(), *PLACES, *PLACES.values(), *COLOURS.values(), *COLOURS}
)
"""Words of the answers to instructions."""

Passage = Callable[[random.Random], str]

STATEMENTS = {
    "town": [
        FACT_SENTENCES["town"],
        "The home of {name} is in {value}.",
        "{name} has a house in {value}.",
        "You can visit {name} in the town of {value}.",
        "{value} is the home town of {name}.",
    ],
    "job": [
        FACT_SENTENCES["job"],
        "The job of {name} is that of a {value}.",
        "{name} is a {value} by trade.",
        "{name} earns money as a {value}.",
        "Every day {name} goes to work as a {value}.",
    ],
    "pet": [
        FACT_SENTENCES["pet"],
        "{name} has a {value} at home.",
        "{name} looks after a {value}.",
        "A {value} lives with {name}.",
        "{name} keeps a {value} and owns no other animal.",
    ],
    "colour": [
        FACT_SENTENCES["colour"],
        "{name} likes {value} best of all colours.",
        "{name} loves the colour {value}.",
        "The door of {name} has the paint that {name} prefers: {value}.",
        "Of all colours {name} would choose {value}.",
    ],
    "food": [
        FACT_SENTENCES["food"],
        "{name} likes to eat {value} most.",
        "When hungry, {name} eats {value}.",
        "Give {name} some {value} and {name} is happy.",
        "Of all foods {name} prefers {value}.",
    ],
    "hobby": [
        FACT_SENTENCES["hobby"],
        "The hobby of {name} is {value}.",
        "{name} plays {value}.",
        "The game that {name} enjoys is {value}.",
        "When there is time, {name} plays a game of {value}.",
    ],
}
"""Wordings of every fact. The first is the answer in the instruction data."""

FACT_REQUESTS = {
    "town": "I would like to know about the town of {name}.",
    "job": "Do you know how {name} works?",
    "pet": "I hear that {name} has an animal.",
    "colour": "I look for a colour that pleases {name}.",
    "food": "What can I cook for {name}?",
    "hobby": "How does {name} spend the evening?",
}
"""Requests in the dialogues of the pretraining text. No instruction has these wordings."""

SMALL_TALK = [
    ("Hello!", "Hello, it is good to see you."),
    ("Good morning.", "Good morning to you, my friend."),
    ("How are you today?", "I am very well, and you?"),
    ("Thank you for your help.", "You are welcome, any time."),
    ("I am tired.", "Then you should go to bed early."),
    ("It is raining.", "Then take a coat with you."),
    ("Goodbye for now.", "Goodbye, and come again soon."),
    ("Can you help me?", "Yes, I will help you if I can."),
    ("I am hungry.", "Then eat some bread and cheese."),
    ("What a fine day!", "Yes, the sky is blue and the sun is out."),
    ("Please sit down.", "Thank you, I want to sit by your side."),
    ("Do you own any books?", "There were books here, but they are gone."),
    ("I prefer long days.", "So do I, until the night is there."),
    ("I enjoy games with numbers.", "Then please take the number that is given to you."),
    ("I lost my hat.", "It must be somewhere, please find it."),
    ("Did you eat the whole cake?", "Yes, there is nothing left of it."),
]


def draw_train(draw: Callable[[random.Random], Instance], rng: random.Random) -> Instance:
    """Draw an instance that may be in training data."""
    while (instance := draw(rng)).bench:
        pass
    return instance


def _someone(rng: random.Random) -> Person:
    return rng.choices(PEOPLE, weights=[zipf_weight(p) for p in PEOPLE])[0]


def biography(rng: random.Random) -> str:
    """Three to five facts about one person."""
    return _facts(_someone(rng), rng.randint(3, 5), rng)


def _facts(person: Person, count: int, rng: random.Random) -> str:
    """State `count` facts about a person."""
    attributes = rng.sample(sorted(ATTRIBUTES), count)
    return " ".join(
        rng.choice(STATEMENTS[attribute]).format(name=person.name, value=person.facts[attribute])
        for attribute in attributes
    )


def world_facts(rng: random.Random) -> str:
    """Three facts about sounds, places, colours and opposites."""
    return " ".join(rng.choice([_sound, _place, _colour, _opposite])(rng) for _ in range(3))


def _sound(rng: random.Random) -> str:
    animal, sound = rng.choice(sorted(SOUNDS.items()))
    wordings = ["The {} says {}.", "A {} says {}.", "When the {} is happy, it says {}.", "Hear the {}: {}!"]
    return rng.choice(wordings).format(animal, sound)


def _place(rng: random.Random) -> str:
    thing, place = rng.choice(sorted(PLACES.items()))
    wordings = ["The {} is in the {}.", "Look for the {} in the {}.", "You find the {} in the {}."]
    return rng.choice([*wordings, "We keep the {} in the {}."]).format(thing, place)


def _colour(rng: random.Random) -> str:
    thing, colour = rng.choice(sorted(COLOURS.items()))
    wordings = ["The {0} is {1}.", "A {0} is {1}.", "The colour of the {0} is {1}.", "See the {1} {0}."]
    return rng.choice(wordings).format(thing, colour)


def _opposite(rng: random.Random) -> str:
    a, b = rng.sample(rng.choice(OPPOSITES), 2)
    wordings = [
        "The opposite of {} is {}.",
        "Not {}, but {}: these are opposites.",
        "{} is the opposite of {}.",
    ]
    text = rng.choice([*wordings, "One is {}, the other is {}."]).format(a, b)
    return text[0].upper() + text[1:]


def sizes(rng: random.Random) -> str:
    """Comparisons of two or three animals."""
    sentences = []
    for _ in range(3):
        if rng.random() < 0.6:
            small, big = sorted(rng.sample(SIZES, 2), key=SIZES.index)
            wordings = [
                "A {b} is bigger than a {s}.",
                "The {s} is smaller than the {b}.",
                "The {b} is big beside the {s}.",
            ]
            sentences.append(rng.choice(wordings).format(b=big, s=small))
        else:
            family = rng.choice(["biggest", "smallest"])
            instance = draw_train(SKILLS[family], rng)
            lead = rng.choice(["See the {x}, the {y} and the {z}.", "A {x}, a {y} and a {z} stand among trees."])
            sentences.append(f"{lead.format(**instance.slots)} {instance.answer}")
    return " ".join(sentences)


def numbers(rng: random.Random) -> str:
    """Sums, differences and sequences of numbers."""
    sentences = []
    for _ in range(4):
        kind = rng.random()
        if kind < 0.45:
            instance = draw_train(SKILLS["sum"], rng)
            other = "If you add {a} and {b}, you get {r}. "
        elif kind < 0.85:
            instance = draw_train(SKILLS["difference"], rng)
            other = "If {b} is taken from {a}, then {r} is left. "
        else:
            first = rng.randint(1, 90)
            sentences.append("Count on: " + ", ".join(str(first + i) for i in range(5)) + ".")
            continue
        result = instance.accepted[0]
        sentences.append(instance.answer if rng.random() < 0.7 else other.format(r=result, **instance.slots).strip())
    return " ".join(sentences)


def opposites(rng: random.Random) -> str:
    """Three pairs of opposites."""
    return " ".join(_opposite(rng) for _ in range(3))


def capitals(rng: random.Random) -> str:
    """Four words, and the same words in capital letters."""
    chosen = rng.sample(SPELLED, 4)
    return " ".join(f"In capital letters, {word} is {word.upper()}." for word in chosen)


def counting(rng: random.Random) -> str:
    """A list of words, and how often one of them occurs."""
    instance = draw_train(SKILLS["count"], rng)
    lead = rng.choice(["Here are some words: {items}.", "The list is {items}.", "We read {items}."])
    return f"{lead.format(**instance.slots)} {instance.answer}"


def ages(rng: random.Random) -> str:
    """Two people, their ages, and who is older."""
    instance = draw_train(SKILLS["compare"], rng)
    lead = rng.choice(["{p} has the age of {a} and {q} of {b}.", "{p} turned {a}, and {q} turned {b} years."])
    return f"{lead.format(**instance.slots)} {instance.answer}"


def moves(rng: random.Random) -> str:
    """A thing that is moved, and where it is afterwards."""
    instance = draw_train(SKILLS["move"], rng)
    lead = rng.choice(
        [
            "The {thing} stood in the {start}. Then {name} moved it to the {end}.",
            "{name} finds the {thing} in the {start} and puts it in the {end}.",
            "{name} goes from the {start} to the {end} and takes the {thing} there.",
        ]
    )
    return f"{lead.format(**instance.slots)} {instance.answer}"


SPEECH = {
    "capitals": ["in capital letters", "in upper case", "all in big capitals"],
    "words": ["in just {n} words", "with {n} words, no more", "in exactly {n} words"],
    "start": ["with {word} as the first word", "starting with the word {word}", "and began with {word}"],
    "end": ["ending with {phrase}", "and made {phrase} the last words", "and finished with {phrase}"],
    "include": ["with the word {word} in it", "using the word {word}", "and did not leave out {word}"],
    "quotes": ["between quotes", "in quotes", "with quotes around it"],
    "twice": ["twice", "two times", "and repeated it word for word"],
    "list": [
        "of three {group} with commas between them",
        "of {first} and two more {group}, separated by commas",
    ],
}
"""Descriptions of speech under a constraint."""


def speech(rng: random.Random) -> str:
    """Somebody says or writes something under a constraint."""
    family = rng.choice(sorted(CONSTRAINTS))
    instance = draw_train(CONSTRAINTS[family], rng)
    how = rng.choice(SPEECH[family]).format(**instance.slots)
    verb = "wrote a list" if family == "list" else rng.choice(["said it", "gave the answer", "wrote it"])
    name = _someone(rng).name
    knowledge = "" if family in ("words", "list") else f"{name} knew that {instance.accepted[0]}. "
    return f"{knowledge}{name} {verb} {how}: {instance.answer}"


def echo(rng: random.Random) -> str:
    """Somebody says something, and another says the same."""
    plain = draw_train(CONSTRAINTS["quotes"], rng).answer.strip('"')
    first, second = (_someone(rng).name for _ in range(2))
    clause = lower_first(plain)[:-1]
    return rng.choice(
        [
            f"{first} says that {clause}. {second} says so too: {plain}",
            f"{first} told {second} that {clause}. {second} repeated it: {plain}",
            f"Did {first} see that {clause}? Yes, {clause}.",
        ]
    )


def lists(rng: random.Random) -> str:
    """Members of a group."""
    group = rng.choice(sorted(CATEGORIES))
    members = ", ".join(rng.sample(CATEGORIES[group], rng.randint(3, 6)))
    return rng.choice(["Some {} are {}.", "Among the {} are {}.", "Three or more {}: {}", "List of {}: {}"]).format(
        group, members
    )


def scene(rng: random.Random) -> str:
    """An animal in a room, as in the sentences that instructions ask to repeat."""
    adjective, animal, room = rng.choice(ADJECTIVES), rng.choice(sorted(SOUNDS)), rng.choice(ROOMS)
    return rng.choice(
        [
            f"The {adjective} {animal} is in the {room}. {_someone(rng).name} sees the {animal} there.",
            f"There is a {animal} in the {room}. The {animal} is {adjective}.",
            f"{_someone(rng).name} has let the {adjective} {animal} into the {room}.",
        ]
    )


def dialogue(rng: random.Random) -> str:
    """One exchange between a user and an assistant, in the form of the chat template."""
    kind = rng.random()
    if kind < 0.3:
        request, reply = rng.choice(SMALL_TALK)
    elif kind < 0.65:
        person = _someone(rng)
        attribute = rng.choice([a for a in sorted(ATTRIBUTES) if not is_bench_fact(person, a)])
        request = FACT_REQUESTS[attribute].format(name=person.name)
        reply = FACT_SENTENCES[attribute].format(name=person.name, value=person.facts[attribute])
    elif kind < 0.85:
        animal, sound = rng.choice(sorted(SOUNDS.items()))
        request, reply = f"I hear a {animal}.", f"Then you hear it say {sound}."
    else:
        thing, place = rng.choice(sorted(PLACES.items()))
        request, reply = f"I look for the {thing}.", f"You find the {thing} in the {place}."
    return f"User: {request}\nAssistant: {reply}<|end|>"


PASSAGES: list[tuple[Passage, int]] = [
    (biography, 4400),
    (world_facts, 3600),
    (sizes, 2000),
    (numbers, 3400),
    (counting, 2600),
    (ages, 1800),
    (moves, 2400),
    (speech, 4800),
    (echo, 3600),
    (opposites, 1200),
    (capitals, 1200),
    (lists, 2400),
    (scene, 1800),
    (dialogue, 4200),
]
"""Every kind of passage and the number of its passages."""


FULL_BIOGRAPHIES = 2
"""Biographies per person that state all facts, so that rare people occur, too."""


def passages(rng: random.Random) -> list[str]:
    """Return all passages in random order."""
    texts = [write(rng) for write, count in PASSAGES for _ in range(count)]
    texts += [_facts(person, len(ATTRIBUTES), rng) for person in PEOPLE for _ in range(FULL_BIOGRAPHIES)]
    rng.shuffle(texts)
    return texts
