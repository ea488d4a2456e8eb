"""Posts of a forum, and their titles: what is asked for stands in the question, what it is about further up."""

from random import Random

from words import split_of, word

SLICES = ("unseen_values", "unseen_wordings", "unseen_objects")
OBJECTS = {
    "train": """table bench door window fence shed roof wall boat canoe tent bicycle piano guitar violin drum sofa
        carpet curtain mirror ladder bucket stove oven pond fountain hedge lawn path gate cupboard drawer shelf desk
        engine pump trailer wagon cart sledge kite puppet clock watch lantern candle basket barrel blanket
        jacket saddle helmet""".split(),
    "validation": "greenhouse harp tractor wardrobe chimney anvil".split(),
    "test": "balcony cello caravan hammock fireplace loom aquarium".split(),
}
ADJECTIVES = "used small wooden green heavy rusty broken large cheap round narrow white black noisy tall".split()
VERBS = "repair clean paint sell move build store buy hide lift measure cover test wash tune warm dry mend".split()
TIMES = ["", "", "in winter", "before the rain", "without tools", "at home", "on my own", "for a friend", "at night"]
KINDS = {
    "How to": {
        "train": [
            "How do I {v} it{w}?",
            "How would you {v} it{w}?",
            "Tell me how to {v} it{w}.",
            "How can one {v} it{w}?",
        ],
        "validation": ["Can you tell me how to {v} it{w}?"],
        "test": ["How can I {v} it{w}?"],
    },
    "Where to": {
        "train": ["Where can I {v} it{w}?", "Which is a good place to {v} it{w}?", "Where would you {v} it{w}?"],
        "validation": ["Tell me where to {v} it{w}."],
        "test": ["Where do I {v} it{w}?"],
    },
    "Best time to": {
        "train": [
            "When should I {v} it{w}?",
            "When is it best to {v} it{w}?",
            "What is the time of year to {v} it{w}?",
        ],
        "validation": ["When do I {v} it{w}?"],
        "test": ["When would you {v} it{w}?"],
    },
    "Cost to": {
        "train": ["What does it cost to {v} it{w}?", "How much is it to {v} it{w}?", "Is it dear to {v} it{w}?"],
        "validation": ["How much would it cost to {v} it{w}?"],
        "test": ["Tell me what it costs to {v} it{w}."],
    },
}
OPENINGS = {
    "train": [
        "I have a {x}.",
        "Last year I bought a {x}.",
        "We found a {x} behind the house.",
        "A {x} stands in my kitchen.",
        "My aunt gave me a {x}.",
        "There is a {x} at our school.",
        "Our house came with a {x}.",
        "This is about a {x}.",
    ],
    "validation": ["Last year my aunt gave us a {x}.", "Behind my house there is a {x}."],
    "test": ["We have a {x} in our kitchen.", "Last year I found a {x} at school."],
}
# Sentences about something else.
FILLERS = {
    "train": [
        "My brother {n} wanted a {y} instead.",
        "It is not a {y}.",
        "{n} likes it a lot.",
        "The neighbours only know about a {y}.",
        "I am new here.",
        "I asked {n} already.",
        "{n} has a {y}, but that is fine.",
    ],
    "validation": ["{n} only wanted a {y}."],
    "test": ["My neighbours like a {y} instead."],
}
GREETINGS = ["Hello all.", "Hi.", "", "", "", ""]


def pair_split(verb: str, thing: str) -> str:
    """The split that may use this verb with this object."""
    return split_of(f"{verb} {thing}")


def draw_row(random: Random, split: str, held_out: str) -> dict[str, str]:
    """One row without its id; `held_out` is the slice, or "" for a row of train."""
    wordings = split if held_out == "unseen_wordings" else "train"
    objects = split if held_out == "unseen_objects" else "train"
    while True:
        verb, thing = random.choice(VERBS), random.choice(OBJECTS[objects])
        if held_out == "unseen_objects" or pair_split(verb, thing) == split:
            break
    about = described(random, split, thing)
    when = random.choice(TIMES)
    asked = random.choice(list(KINDS))
    sentences = [random.choice(OPENINGS[wordings]).format(x=about)]
    if random.random() < 0.75:
        other = described(random, split, random.choice([other for other in OBJECTS[objects] if other != thing]))
        sentences.append(random.choice(FILLERS[wordings]).format(n=word(random, split), y=other))
    sentences.append(random.choice(KINDS[asked][wordings]).format(v=verb, w=f" {when}" if when else ""))
    greeting = random.choice(GREETINGS)
    post = " ".join([greeting, *sentences] if greeting else sentences)
    return {"slice": held_out, "question": post, "title": f"{asked} {verb} a {about}{' ' + when if when else ''}"}


def described(random: Random, split: str, thing: str) -> str:
    """The object with an adjective, a made-up brand, or both."""
    kind = random.random()
    if kind < 0.4:
        return f"{random.choice(ADJECTIVES)} {thing}"
    if kind < 0.8:
        return f"{word(random, split)} {thing}"
    return f"{random.choice(ADJECTIVES)} {word(random, split)} {thing}"
