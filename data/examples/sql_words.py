"""Tables and wordings of the text-to-SQL rows, and which of them are held out."""

# Domain: (table names, text columns, number columns). A held-out domain shares no name with any other.
_TRAIN_TABLES = """
buses trains trucks | driver route colour | seats speed age
players teams coaches | country city sponsor | goals height matches
books poems films | author language genre | pages price copies
songs albums concerts | artist studio label | minutes rating sales
parcels letters shipments | sender status carrier | weight fee volume
cakes soups salads | cook origin flavour | sugar salt servings
houses flats offices | owner street agent | rooms rent area
students courses exams | school subject tutor | grade hours score
orders invoices payments | customer method region | amount tax total
farms fields orchards | farmer crop village | acres cows yield
planes flights pilots | airline captain airport | distance delay crew
rivers lakes bridges | state builder material | length depth width
phones laptops cameras | brand model store | memory battery size
doctors nurses clinics | hospital ward illness | visits dose beds
hotels hostels camps | guest manager town | stars nights bookings
animals birds horses | species breed keeper | eggs teeth wings
trees flowers shrubs | family season park | leaves roots petals
shirts shoes coats | style fabric pattern | stock buttons returns
"""
_VALIDATION_TABLES = """
mines quarries shafts | foreman mineral province | tonnage tunnels explosions
choirs bands singers | conductor hymn parish | rehearsals voices medals
castles towers ruins | knight duchy legend | walls gates cannons
"""
_TEST_TABLES = """
vineyards wines cellars | grape winemaker valley | vintage barrels bottles
theatres plays actors | playwright troupe role | scenes applause tickets
harbours yachts lighthouses | skipper marina pennant | knots berths anchors
laboratories samples probes | chemist reagent hazard | acidity density dilution
"""


def _tables(text: str) -> list[tuple[list[str], list[str], list[str]]]:
    domains = []
    for line in text.strip().splitlines():
        nouns, texts, numbers = (part.split() for part in line.split("|"))
        domains.append((nouns, texts, numbers))
    return domains


TABLES = {"train": _tables(_TRAIN_TABLES), "validation": _tables(_VALIDATION_TABLES), "test": _tables(_TEST_TABLES)}

# A wording is a sentence frame ({t} table, {c} column, {w} condition, {n} number, {g} grouping column)
# or the form of a condition. Those of validation and test occur nowhere in train.
FRAMES: dict[str, dict[str, list[str]]] = {
    "list": {
        "train": [
            "Show the {c} of all {t} {w}.",
            "List the {c} of {t} {w}.",
            "What is the {c} of the {t} {w}?",
            "Give me the {c} of every one of the {t} {w}.",
            "Which {c} do the {t} {w} have?",
            "I need the {c} for {t} {w}.",
            "For {t} {w}, show the {c}.",
            "Among the {t} {w}, which {c} is there?",
            "Find the {c} of {t} {w}.",
            "Tell me the {c} of those {t} {w}.",
            "Of the {t} {w}, print the {c}.",
            "Look up the {c} for all {t} {w}.",
            "Can you list the {c} for all the {t} {w}?",
        ],
        "validation": [
            "Could you show the {c} for the {t} {w}?",
            "Print the {c} of every one of the {t} {w}.",
            "For those {t} {w}, find the {c}.",
            "I want to see the {c} of {t} {w}.",
        ],
        "test": [
            "Can you show me the {c} of {t} {w}?",
            "For all {t} {w}, list the {c}.",
            "Please find the {c} for each of the {t} {w}.",
            "Tell me which {c} the {t} {w} have.",
        ],
    },
    "count": {
        "train": [
            "How many {t} are there {w}?",
            "Count the {t} {w}.",
            "What is the number of {t} {w}?",
            "Give me the count of {t} {w}.",
            "Tell me how many {t} we have {w}.",
            "For {t} {w}, how many are there?",
            "I need the number of {t} {w}.",
            "How many of the {t} exist {w}?",
            "Show how many {t} there are {w}.",
        ],
        "validation": [
            "Could you count all {t} {w}?",
            "Find the number of those {t} {w}.",
            "Of the {t} {w}, how many exist?",
        ],
        "test": [
            "Can you tell me how many {t} there are {w}?",
            "Among the {t} {w}, how many do we have?",
            "Print the count of all {t} {w}.",
        ],
    },
    "aggregate": {
        "train": [
            "What is the {a} {c} of {t} {w}?",
            "Show the {a} {c} of all {t} {w}.",
            "Give me the {a} {c} for {t} {w}.",
            "Find the {a} {c} of the {t} {w}.",
            "For {t} {w}, what is the {a} {c}?",
            "I need the {a} {c} of those {t} {w}.",
            "Tell me the {a} {c} among {t} {w}.",
            "Work out the {a} {c} for all the {t} {w}.",
            "Of the {t} {w}, show the {a} {c}.",
        ],
        "validation": [
            "Could you work out the {a} {c} of the {t} {w}?",
            "Print the {a} {c} for those {t} {w}.",
            "For all {t} {w}, find the {a} {c}.",
        ],
        "test": [
            "Can you give me the {a} {c} of all {t} {w}?",
            "Among the {t} {w}, what is the {a} {c}?",
            "Please tell me the {a} {c} for the {t} {w}.",
        ],
    },
    "top": {
        "train": [
            "Show the {c} of the {n} {t} with the {s} {o}.",
            "Which {n} {t} have the {s} {o}? Show the {c}.",
            "List the {c} of the {n} {t} that have the {s} {o}.",
            "Give me the {c} for the {n} {t} with the {s} {o}.",
            "For the {n} {t} with the {s} {o}, show the {c}.",
            "Find the {n} {t} with the {s} {o} and list the {c}.",
            "I need the {c} of the {n} {t} with the {s} {o}.",
            "Of all {t}, take the {n} with the {s} {o} and show the {c}.",
        ],
        "validation": [
            "Could you list the {c} of those {n} {t} with the {s} {o}?",
            "Take the {n} {t} that have the {s} {o} and print the {c}.",
        ],
        "test": [
            "Can you show me the {c} of the {n} {t} with the {s} {o}?",
            "Tell me the {c} for those {n} {t} that have the {s} {o}.",
            "Find the {c} of the {n} {t} with the {s} {o}.",
        ],
    },
    "group": {
        "train": [
            "How many {t} are there for each {g} {w}?",
            "Count the {t} per {g} {w}.",
            "For each {g}, count the {t} {w}.",
            "Show the number of {t} per {g} {w}.",
            "Give me the count of {t} for every {g} {w}.",
            "For every {g}, how many {t} are there {w}?",
            "I need the number of {t} for each {g} {w}.",
        ],
        "validation": [
            "Could you count the {t} for every {g} {w}?",
            "For each {g}, show the number of {t} {w}.",
        ],
        "test": [
            "Tell me how many {t} there are per {g} {w}.",
            "For every {g}, find the count of {t} {w}.",
        ],
    },
}
TEXT_CONDITIONS = {
    "train": [
        "where {c} is '{v}'",
        "with {c} '{v}'",
        "whose {c} is '{v}'",
        "that have {c} '{v}'",
        "with '{v}' as {c}",
        "where the {c} says '{v}'",
    ],
    "validation": ["that have '{v}' as the {c}"],
    "test": ["whose {c} says '{v}'"],
}
NUMBER_CONDITIONS = {
    ">": {
        "train": [
            "where {c} is more than {v}",
            "whose {c} is over {v}",
            "with more than {v} {c}",
            "that have {c} over {v}",
        ],
        "validation": ["where the {c} is over {v}"],
        "test": ["whose {c} is more than {v}"],
    },
    "<": {
        "train": [
            "where {c} is less than {v}",
            "whose {c} is under {v}",
            "with less than {v} {c}",
            "that have {c} under {v}",
        ],
        "validation": ["where the {c} is under {v}"],
        "test": ["whose {c} is less than {v}"],
    },
    "=": {
        "train": ["where {c} is {v}", "with {c} {v}", "whose {c} is {v}", "that have {c} {v}", "with {v} as {c}"],
        "validation": ["that have {v} as the {c}"],
        "test": ["with {v} as the {c}"],
    },
}
AGGREGATES = {"average": "AVG", "total": "SUM", "largest": "MAX", "smallest": "MIN"}
SUPERLATIVES = {"highest": "DESC", "lowest": "ASC", "largest": "DESC", "smallest": "ASC"}
NUMERALS = {2: "two", 3: "three", 4: "four", 5: "five"}
