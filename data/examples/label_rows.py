"""Customer messages and the one thing that each asks for."""

from random import Random

from words import code, number, word

SLICES = ("unseen_values", "unseen_wordings", "two_topics")
# What a message can ask for, as infinitives; {p} product, {o} order, {d} day.
ACTIONS = {
    "refund": ["refund order {o}", "give me my money back", "return my {d} euros", "refund the {p}"],
    "delivery": ["track parcel {o}", "deliver the {p}", "find my parcel", "deliver to {n}"],
    "password": ["reset my password", "unlock login {o}", "fix the login of {n}", "send a new password"],
    "invoice": ["send me the invoice", "correct bill {o}", "print the invoice of the {p}", "send {n} the bill"],
    "cancel": ["cancel order {o}", "stop my contract", "cancel the {p}", "stop the order of {n}"],
    "address": ["change my address", "use the street of {n}", "correct my street", "change address {d}"],
    "repair": ["repair the {p}", "mend my broken {p}", "mend part {o}", "repair the {p} of {n}"],
    "upgrade": ["upgrade my plan", "give {n} a bigger plan", "upgrade contract {o}", "move me to plan {d}"],
}
LABELS = tuple(sorted(ACTIONS))
OPENINGS = {
    "train": ["Hello.", "Hi, this is {n}.", "Good morning.", "{n} here.", "My name is {n}.", "", "", ""],
    "validation": ["Good morning, {n} here."],
    "test": ["Hello, my name is {n}."],
}
CLOSINGS = ["Thanks.", "Best wishes, {n}.", "My number is {d}.", "", "", "", "", "", ""]
REQUESTS = {
    "train": [
        "Please {a}.",
        "Could you {a}?",
        "I would like you to {a}.",
        "I want you to {a}.",
        "Can somebody {a}?",
        "I ask you to {a} today.",
        "It is time to {a}, please.",
        "Would you {a} this week?",
        "You should {a} now.",
        "I hope that you can {a}.",
    ],
    "validation": ["Could somebody please {a} today?", "I would like to ask you to {a}.", "Now you should {a}."],
    "test": ["Would you please {a} now?", "I hope that somebody can {a} this week.", "Today I want you to {a}."],
}
# Sentences that name a topic without asking for it.
ASIDES = {
    "train": [
        "Please do not {a}.",
        "There is no need to {a}.",
        "I am not asking you to {a}.",
        "You did already {a}.",
        "I never wanted you to {a}.",
        "Last week somebody was kind enough to {a}.",
        "Yesterday you promised to {a}, and that is done.",
        "My brother asked you to {a}, not me.",
        "You do not have to {a}.",
        "Nobody should {a}.",
    ],
    "validation": [
        "You do not need to {a}.",
        "Last week you did already {a}.",
        "I am not the one who wants you to {a}.",
    ],
    "test": ["Nobody is asking you to {a}.", "Yesterday somebody did already {a}.", "You never have to {a}."],
}
PRODUCTS = "lamp kettle radio chair heater tablet mixer toaster printer fan speaker clock".split()


def pair_split(aside: str, request: str) -> str:
    """The split that may use this ordered pair of topics: a quarter each for validation and test."""
    place = (LABELS.index(aside) + LABELS.index(request)) % 4
    return {0: "test", 1: "validation"}.get(place, "train")


def draw_row(random: Random, split: str, held_out: str) -> dict[str, str]:
    """One row without its id; `held_out` is the slice, or "" for a row of train."""
    wordings = split if held_out == "unseen_wordings" else "train"
    pairs = split if held_out == "two_topics" else "train"
    label = random.choice(LABELS)
    sentences = [random.choice(REQUESTS[wordings]).replace("{a}", random.choice(ACTIONS[label]))]
    if held_out == "two_topics" or random.random() < 0.3:
        others = [other for other in LABELS if other != label and pair_split(other, label) == pairs]
        aside = random.choice(ASIDES[wordings]).replace("{a}", random.choice(ACTIONS[random.choice(others)]))
        sentences.insert(random.randint(0, 1), aside)
    sentences.insert(0, random.choice(OPENINGS[wordings]))
    sentences.append(random.choice(CLOSINGS))
    text = " ".join(sentence for sentence in sentences if sentence)
    while "{" in text:
        text = text.replace("{n}", word(random, split), 1).replace("{o}", code(random, split), 1)
        text = text.replace("{d}", str(number(random, split)), 1).replace("{p}", product(random, split), 1)
    return {"slice": held_out, "text": text, "label": label}


def product(random: Random, split: str) -> str:
    """A product, mostly with a made-up brand."""
    return f"{word(random, split)} {random.choice(PRODUCTS)}" if random.random() < 0.7 else random.choice(PRODUCTS)
