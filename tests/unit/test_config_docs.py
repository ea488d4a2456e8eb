"""docs/config.md is what its generator makes of the schema."""

from pathlib import Path

import yaml

from config_docs import PAGE, SCHEMA, page, rows

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_that_of_the_schema():
    schema = yaml.safe_load((ROOT / SCHEMA).read_text(encoding="utf-8"))
    made = (ROOT / PAGE).read_text(encoding="utf-8") if (ROOT / PAGE).is_file() else ""
    assert made == page(schema), f"{PAGE} is not that of {SCHEMA}; run: .venv/bin/python tools/config_docs.py"


def test_every_key_is_described_by_a_sentence():
    schema = yaml.safe_load((ROOT / SCHEMA).read_text(encoding="utf-8"))
    for section in (schema, *schema["$defs"].values()):
        for key, item, _ in rows(section):
            text = schema["$defs"].get(item.get("$ref", "").rpartition("/")[2], item).get("description", "")
            assert text.endswith("."), f"{SCHEMA}: {key}: describe it, in quotes where there is a comma: {text!r}"


SMALL = {
    "properties": {
        "depth": {"type": "integer", "minimum": 1, "default": 2, "description": "How deep | wide."},
        "pond": {"type": "object", "properties": {"kind": {"enum": ["a", "b"], "default": "a"}}, "required": ["kind"]},
        "fish": {"type": "object", "additionalProperties": {"$ref": "#/$defs/fish"}},
        "days": {"type": "array", "items": {"$ref": "#/$defs/fish"}},
    },
    "$defs": {
        "name": {"type": "string"},
        "fish": {
            "type": "object",
            "description": "Swims.",
            "properties": {"end": {"type": ["string", "null"], "default": "\n"}},
        },
    },
}


def test_keys_are_named_by_their_place():
    assert [key for key, _, _ in rows(SMALL)] == ["depth", "pond", "pond.kind", "fish", "days"]


def test_a_row_tells_type_bounds_and_default_and_a_bar_stays_in_its_cell():
    text = page(SMALL)
    assert r"| `depth` | integer, ≥ 1 | `2` | How deep \| wide. |" in text
    assert "| `pond.kind` | `a`, `b` | required |  |" in text
    assert '| `end` | text or `null` | `"\\n"` |  |' in text


def test_a_section_and_its_places_link_to_each_other():
    text = page(SMALL)
    assert "| `fish` | mapping of name to [fish](#fish) |  |  |" in text
    assert "| `days` | list of [fish](#fish) |  |  |" in text
    assert "## Fish\n\nStands at `fish.{name}` of [Configuration](#configuration), `days[…]` of [Configuration]" in text
    assert "Swims." in text
    assert "## Name" not in text
