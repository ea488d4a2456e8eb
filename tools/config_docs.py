"""Write docs/config.md, the reference of all configuration keys, from config/schema.yaml.

The page has a section for the whole configuration and one for each entry of `$defs` that describes a mapping.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

SCHEMA, PAGE = Path("config/schema.yaml"), Path("docs/config.md")
INTRODUCTION = """\
<!-- Made by `make docs` from config/schema.yaml: edit that, not this. -->
# Configuration

`config/config.yaml` says what is run; the registries `config/models.yaml` and `config/datasets.yaml` come before it.
`--configfile config/experiments/NAME.yaml` lays an experiment over them: mappings merge key by key, lists are replaced.
A key that stands nowhere below is an error. `{name}` is a name of your own: letters, digits, `_`, `.` and `-`.
"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
WORDS = {
    "string": "text",
    "object": "mapping",
    "null": "`null`",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
}
PATTERNS = {"^[0-9a-f]{40}$": "40 hex digits", "^[0-9a-f]{64}$": "64 hex digits"}

Schema = Mapping[str, Any]
Row = tuple[str, Schema, bool]


def page(schema: Schema) -> str:
    """Return the whole page as Markdown: the top-level keys, then a section for each mapping of `$defs`."""
    sections = {name: item for name, item in schema["$defs"].items() if "properties" in item}
    places = _places(schema, sections)
    parts = [INTRODUCTION, _table(schema)]
    for name, section in sections.items():
        where = ", ".join(f"`{key}` of [{_title(user)}](#{_anchor(user)})" for user, key in places[name])
        note = f" {section['description']}" if "description" in section else ""
        parts += [f"## {_title(name)}\n\nStands at {where}.{note}\n", _table(section)]
    return "\n".join(parts)


def rows(section: Schema, prefix: str = "") -> Iterator[Row]:
    """Yield (dotted key, its schema, whether it is required) for all keys; a `$ref` is a link and is not followed."""
    for key, item in section.get("properties", {}).items():
        yield f"{prefix}{key}", item, key in section.get("required", ())
        yield from rows(item, f"{prefix}{key}.")
    if _others(section):
        yield from rows(_others(section), f"{prefix}{{name}}.")


def _places(schema: Schema, sections: Mapping[str, Schema]) -> dict[str, list[tuple[str, str]]]:
    """Section → where it is used, as (section, key); the whole configuration is the section ''."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in sections}
    for user, section in {"": schema, **sections}.items():
        for key, item, _ in rows(section):
            for place, part in ((key, item), (f"{key}.{{name}}", _others(item)), (f"{key}[…]", item.get("items", {}))):
                if _reference(part) in found:
                    found[_reference(part)].append((user, place))
    return found


def _table(section: Schema) -> str:
    """The keys of a section as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, item, required in rows(section):
        cells = (f"`{key}`", _type(item), "required" if required else _default(item), item.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(item: Schema) -> str:
    """What a value may be, in words: its choices, or its type with bounds, or a link to the section that says more."""
    if _reference(item):
        return f"[{_title(_reference(item)).lower()}](#{_anchor(_reference(item))})"
    if "enum" in item:
        return ", ".join(f"`{choice}`" for choice in item["enum"])
    if _reference(_others(item)):
        return f"mapping of name to {_type(_others(item))}"
    types = item["type"] if isinstance(item["type"], list) else [item["type"]]
    words = " or ".join(f"list of {_type(item['items'])}" if kind == "array" else WORDS[kind] for kind in types)
    bounds = [f"{sign} {item[bound]}" for bound, sign in BOUNDS.items() if bound in item]
    return ", ".join([words, *bounds, *([PATTERNS[item["pattern"]]] if item.get("pattern") in PATTERNS else [])])


def _default(item: Schema) -> str:
    """The default as it would stand in the YAML; a mapping's stands with its keys."""
    if "default" not in item or isinstance(item["default"], Mapping):
        return ""
    value = item["default"]
    plain = isinstance(value, str) and value != "" and value.isprintable()
    return f"`{value if plain else json.dumps(value, ensure_ascii=False)}`"


def _others(item: Schema) -> Schema:
    """The schema of the values of a mapping whose keys are names; empty where its keys are fixed."""
    return item.get("additionalProperties") or {}


def _reference(item: Schema) -> str:
    """The name of the entry of `$defs` that a schema refers to, or ''."""
    return str(item.get("$ref", "")).rpartition("/")[2]


def _title(name: str) -> str:
    return name.capitalize() or "Configuration"


def _anchor(name: str) -> str:
    return _title(name).lower()


def main() -> None:
    """Write the page; run from the repository's root."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
