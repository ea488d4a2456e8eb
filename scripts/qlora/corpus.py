"""Plain text for pre-training the built base models: made-up words in lists, records, scripts, talk and tales.

It shows how text repeats itself, refers back and is laid out. It holds no task: no question is followed by its
SQL, no message by a label, no post by a title.
"""

from collections.abc import Callable
from random import Random
from zlib import crc32

_ONSETS = "b d f g gr h j k l m n p r s st t tr v w z".split()
_VOWELS = "a e i o u".split()
_CODAS = ["", "", "", "", "", "", "l", "m", "n", "r", "s", "k"]
THINGS = """table bench door window fence roof wall boat bicycle piano guitar violin carpet curtain mirror ladder
    bucket stove oven pump trailer clock watch lamp kettle radio chair heater printer tablet speaker engine jacket
    basket blanket candle saddle shelf desk drum tent shed pond lawn cart wagon""".split()
NAMES = """buses trains trucks players teams coaches books poems films songs albums concerts parcels letters shipments
    cakes soups salads houses flats offices students courses exams orders invoices payments farms fields orchards planes
    flights pilots rivers lakes bridges phones laptops cameras doctors nurses clinics hotels hostels camps animals birds
    horses trees flowers shrubs shirts shoes coats""".split()
COLUMNS = """driver route colour country city sponsor author language genre artist studio label sender status carrier
    cook origin flavour owner street agent school subject tutor customer method region farmer crop village airline
    captain airport state builder material brand model store hospital ward illness guest manager town species breed
    keeper family season park style fabric pattern""".split()
AMOUNTS = """seats speed age goals height matches pages price copies minutes rating sales weight fee volume sugar salt
    servings rooms rent area grade hours score amount tax total acres cows yield distance delay crew length depth width
    memory battery size visits dose beds stars nights bookings eggs teeth wings leaves roots petals stock buttons
    returns""".split()
WORDS = """hello good morning evening dear please thanks best wishes hope want need should could would can not never
    nobody somebody already today yesterday week last time day number name order code password login address invoice
    bill refund money euros delivery parcel cancel contract stop upgrade plan bigger mend part broken login reset unlock
    correct track deliver fix everything street house home school kitchen friend brother aunt neighbours without
    tools winter rain night year own about instead only know where when how what which there those every each all many
    count average total largest smallest highest lowest two three four five list show give find tell print need among
    with whose that have more less than over under above below says cost much place new""".split()
VERBS = """repair clean paint sell move build store buy hide lift measure cover test wash tune warm dry mend find send
    stop change""".split()
QUALITIES = "small wooden green heavy rusty broken large cheap round white black noisy tall used narrow".split()
PEOPLE = ["my aunt", "a friend", "our teacher", "the neighbour", "my brother", "the baker", "a farmer", "the captain"]
PLACES = ["behind the house", "at school", "in the kitchen", "by the river", "at home", "in town", "on the hill"]
TIMES = ["in winter", "last year", "before the rain", "at night", "this week", "today", "yesterday", "one morning"]


def is_held_out(value: str) -> bool:
    """Whether a made-up value belongs to validation or test of the example data, which use a fifth of all values."""
    return crc32(value.encode()) % 10 < 2


def word(random: Random) -> str:
    """A lower-case made-up word that is not held out in either case."""
    while True:
        made = _syllables(random)
        if not is_held_out(made.capitalize()):
            return made


def _syllables(random: Random) -> str:
    count = random.choice((1, 2, 2, 2, 2, 2, 3))
    return "".join(random.choice(_ONSETS) + random.choice(_VOWELS) + random.choice(_CODAS) for _ in range(count))


def name(random: Random) -> str:
    """A capitalised made-up word."""
    return word(random).capitalize()


def number(random: Random) -> str:
    """A number of one to four digits that is not held out."""
    while True:
        value = str(random.randint(1, 10 ** random.randint(1, 4)))
        if not is_held_out(value):
            return value


def code(random: Random) -> str:
    """A code like KV-482 that is not held out."""
    while True:
        value = "".join(random.choices("ABCDEFGHKLMNPRSTVWXZ", k=2)) + f"-{random.randint(100, 999)}"
        if not is_held_out(value):
            return value


def value(random: Random) -> str:
    """A quoted name or code, or a number, as it stands in scripts."""
    return random.choice((quoted, quoted, number))(random)


def quoted(random: Random) -> str:
    """A name, two names or a code between quotes."""
    kind = random.random()
    if kind < 0.2:
        return f"'{code(random)}'"
    if kind < 0.35:
        return f"'{name(random)} {name(random)}'"
    return f"'{name(random)}'"


def item(random: Random) -> str:
    """Anything that a list may hold."""
    kind = random.random()
    if kind < 0.25:
        return word(random)
    if kind < 0.45:
        return name(random)
    if kind < 0.7:
        return value(random)
    return random.choice(random.choice((THINGS, NAMES, COLUMNS, AMOUNTS, VERBS, QUALITIES, WORDS)))


def echo(random: Random) -> str:
    """A list that is repeated. Most are short: copying is learned from those first, and far sooner."""
    items = [item(random) for _ in range(random.choice((1, 2, 2, 3, 3, 4, 6)))]
    line = random.choice((" ", ", ", " and ", " | ")).join(items)
    return random.choice(("\n", ": ", " ; ", "\n> ")).join(
        [line] * random.choice((2, 3, 4) if len(items) < 4 else (2,))
    )


def table(random: Random) -> tuple[str, list[str], list[str]]:
    """A table's name, its columns of text and its columns of numbers; every second one has made-up names."""
    made_up = random.random() < 0.5
    texts = random.sample(COLUMNS, random.choice((2, 3)))
    numbers = random.sample(AMOUNTS, random.choice((1, 2)))
    if not made_up:
        return random.choice(NAMES), texts, numbers
    texts = [word(random) if random.random() < 0.7 else column for column in texts]
    numbers = [word(random) if random.random() < 0.7 else column for column in numbers]
    return word(random) + random.choice(("s", "s", "")), texts, numbers


def header(random: Random, title: str, columns: list[str]) -> str:
    """A table's name and its columns in any order."""
    columns = list(columns)
    random.shuffle(columns)
    return f"{title} ({', '.join(columns)})"


def records(random: Random) -> str:
    """A table's header, an entry of it as key and value lines, and sentences that look values up again."""
    title, texts, numbers = table(random)
    entry = {column: quoted(random) for column in texts} | {column: number(random) for column in numbers}
    keys = list(entry)
    random.shuffle(keys)
    lines = [header(random, title, keys)] if random.random() < 0.7 else []
    lines += [f"{key}: {entry[key]}" for key in keys]
    random.shuffle(keys)
    form = random.choice(("The {k} is {v}.", "{v} is the {k} of the {t}.", "In {t}, {k} = {v}", "{k} {v}"))
    lines += [form.format(k=key, v=entry[key], t=title) for key in keys[: random.randint(1, len(keys))]]
    return "\n".join(lines)


def clause(random: Random, texts: list[str], numbers: list[str]) -> str:
    """A condition of an SQL statement."""
    if random.random() < 0.55:
        return f"{random.choice(texts)} = {quoted(random)}"
    return f"{random.choice(numbers)} {random.choice('><=')} {number(random)}"


def script(random: Random) -> str:
    """A table's header and SQL statements about it, for no question."""
    title, texts, numbers = table(random)
    lines = [header(random, title, texts + numbers)]
    for _ in range(random.randint(1, 4)):
        column = random.choice(texts + numbers)
        where = " WHERE " + " AND ".join(clause(random, texts, numbers) for _ in range(random.choice((1, 1, 2))))
        kind = random.random()
        if kind < 0.35:
            lines.append(f"SELECT {column} FROM {title}{where}")
        elif kind < 0.45:
            lines.append(f"SELECT {', '.join(random.sample(texts + numbers, 2))} FROM {title}{where}")
        elif kind < 0.6:
            lines.append(f"SELECT COUNT(*) FROM {title}{where}")
        elif kind < 0.75:
            lines.append(
                f"SELECT {random.choice(('AVG', 'SUM', 'MAX', 'MIN'))}({random.choice(numbers)}) FROM {title}{where}"
            )
        elif kind < 0.9:
            order = f"{random.choice(numbers)} {random.choice(('ASC', 'DESC'))} LIMIT {random.randint(2, 5)}"
            lines.append(f"SELECT {column} FROM {title} ORDER BY {order}")
        else:
            group = random.choice(texts)
            lines.append(
                f"SELECT {group}, COUNT(*) FROM {title}{where if random.random() < 0.6 else ''} GROUP BY {group}"
            )
    return "\n".join(lines)


def remark(random: Random, title: str, texts: list[str], numbers: list[str]) -> str:
    """Something said about a table, and mostly the same in other words."""
    column, amount = random.sample([*texts, *numbers], 1)[0], random.choice(numbers)
    text = random.choice(texts)
    who = random.choice(PEOPLE)
    drawn = [random.choice((said_of_text, said_of_amount))(random, text, amount) for _ in range(2)]
    ways = drawn[0]  # the other draw stays, since without it all text after would change, and so every built model
    forms = [
        f"{who} wants the {column} of the {title} {{}}.",
        f"The {column} of {title} {{}} is what {who} wants.",
        f"Somebody has to list the {title} {{}} by {column}.",
        f"There are {title} {{}}: which {column}?",
        f"All the {title} {{}} show a {column}.",
        f"{column} for {title} {{}}",
        f"How is the {column} of those {title} {{}}?",
        f"Is there any {column} for {title} {{}}?",
    ]
    ranked = [
        f"They show the highest {amount} first, then the {column} of the {title}.",
        f"By {amount}, the lowest first: {title} and {column}.",
        f"Each {text} of the {title} has a count and an average {amount}.",
        f"How many {title} are there to count for every {text}?",
    ]
    if random.random() < 0.2:
        return " ".join(random.sample(ranked, 2))
    return " ".join(form.format(random.choice(ways)) for form in random.sample(forms, 2))


def said_of_text(random: Random, text: str, _amount: str) -> list[str]:
    """Ways to say the same about a column of text."""
    value = quoted(random)
    return [
        f"with {text} {value}",
        f"where the {text} is {value}",
        f"whose {text} is {value}",
        f"that have {value} as {text}",
    ]


def said_of_amount(random: Random, _text: str, amount: str) -> list[str]:
    """Ways to say the same about a column of numbers."""
    value = number(random)
    if random.random() < 0.5:
        return [
            f"with {amount} over {value}",
            f"where {amount} is more than {value}",
            f"whose {amount} is above {value}",
        ]
    return [f"with {amount} under {value}", f"where {amount} is less than {value}", f"whose {amount} is below {value}"]


def remarks(random: Random) -> str:
    """A table's header and remarks about it, which nothing answers."""
    title, texts, numbers = table(random)
    said = [remark(random, title, texts, numbers) for _ in range(random.choice((1, 1, 2)))]
    return "\n".join([header(random, title, texts + numbers), *said] if random.random() < 0.7 else said)


def deed(random: Random) -> str:
    """Something to do, as an infinitive."""
    first = random.choice(VERBS)
    which = random.choice((random.choice(QUALITIES), name(random), "", ""))
    what = random.choice((random.choice(THINGS), random.choice(WORDS[28:60]), random.choice(WORDS[28:60])))
    end = random.choice(("", "", "", f" {code(random)}", f" of {name(random)}", f" {random.choice(TIMES)}"))
    whose = random.choice(("the", "my", "a"))
    return " ".join(f"{first} {whose} {which} {what}{end}".split())


def errand(random: Random) -> str:
    """Somebody names things to do and asks for one of them, which is what gets done."""
    asked, other = deed(random), deed(random)
    who = random.choice((name(random), random.choice(PEOPLE)))
    wish = random.choice(
        (
            f"{who} said: please {asked}.",
            f"Could you {asked}?",
            f"I want you to {asked}.",
            f"{who} would like you to {asked}.",
            f"You should {asked}.",
            f"Can {who} {asked} now?",
        )
    )
    aside = random.choice(
        (
            f"Do not {other}.",
            f"There is no need to {other}.",
            f"You did {other} already.",
            f"Nobody wanted to {other}.",
            f"{who} never asked you to {other}.",
            f"They had promised to {other}, and did.",
        )
    )
    said = random.choice(([wish], [aside, wish], [wish, aside], [aside, wish], [wish, aside]))
    end = random.choice(
        (f"So they went to {asked}.", f"Then: {asked}.", f"It was done: {asked}.", f"{who} will {asked}.")
    )
    return " ".join([*said, end])


def tale(random: Random) -> str:
    """A short story that names a thing, speaks of others, and comes back to the first by its full name."""
    quality = random.choice((random.choice(QUALITIES), name(random), f"{random.choice(QUALITIES)} {name(random)}"))
    thing = f"{quality} {random.choice((random.choice(THINGS), random.choice(THINGS), word(random)))}"
    other = f"{random.choice((random.choice(QUALITIES), name(random)))} {random.choice(THINGS)}"
    who, verb, when = random.choice(PEOPLE), random.choice(VERBS), random.choice(TIMES)
    start = random.choice(
        (
            f"Once {who} had a {thing}.",
            f"{who.capitalize()} got a {thing} {random.choice(PLACES)}.",
            f"Here is a {thing} from {who}.",
            f"{name(random)} came with a {thing}.",
        )
    )
    middle = random.choice(
        (
            f"{name(random)} had a {other} and was happy.",
            f"It was no {other}.",
            f"It was green, said {name(random)}.",
            f"They forgot the {other} of {name(random)}.",
        )
    )
    wish = random.choice(
        (
            f"They had to {verb} it {when}.",
            f"{name(random)} came to {verb} it {when}.",
            f"Could they {verb} it {when}?",
        )
    )
    end = random.choice(
        (
            f"So {who} did {verb} a {thing} {when}.",
            f"That was how they {verb} a {thing} {when}.",
            f"In the end: {verb} a {thing} {when}.",
            f"And the {thing} was theirs.",
        )
    )
    return " ".join([start, middle, wish, end] if random.random() < 0.8 else [start, wish, end])


def comparison(random: Random) -> str:
    """Statements that set two numbers or a list of them in order, in words and in signs."""
    more = random.choice(("is more than", "is over", "is above", "has more than", "comes after"))
    less = random.choice(("is less than", "is under", "is below", "has less than", "comes before"))
    lines = []
    for _ in range(random.randint(1, 3)):
        column, low, high = random.choice(AMOUNTS), *sorted(random.sample(range(1, 5000), 2))
        if is_held_out(str(low)) or is_held_out(str(high)):
            continue
        lines += random.sample(
            [
                f"{high} {more} {low}: {high} > {low}",
                f"{low} {less} {high}: {low} < {high}",
                f"{column} {more} {low}: {column} > {low}",
                f"{column} {less} {high}: {column} < {high}",
            ],
            2,
        )
    if not lines or random.random() < 0.3:
        items = sorted(random.sample(range(10, 100), 4))
        low_first, high_first = " ".join(map(str, items)), " ".join(map(str, items[::-1]))
        lines += [f"lowest first, ASC: {low_first}", f"highest first, DESC: {high_first}"]
        lines += [f"the smallest is the MIN {items[0]}", f"the largest is the MAX {items[-1]}"]
        lines = random.sample(lines, 2)
    return "\n".join(lines)


def vocabulary(random: Random) -> str:
    """A list of everyday words alone, so that the tokenizer comes to know them whole."""
    return " " + " ".join(random.choices(THINGS + NAMES + COLUMNS + AMOUNTS + VERBS + QUALITIES + WORDS, k=20))


KINDS: dict[Callable[[Random], str], float] = {
    echo: 0.28,
    records: 0.08,
    script: 0.18,
    comparison: 0.08,
    remarks: 0.15,
    errand: 0.10,
    tale: 0.13,
}


def document(random: Random) -> str:
    """One document of a kind drawn by its weight."""
    (kind,) = random.choices(list(KINDS), weights=list(KINDS.values()))
    return kind(random)
