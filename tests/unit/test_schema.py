"""The schema of a configuration describes every key, gives its default, and takes no other."""

from typing import Any

import pytest
import yaml

from qlora.config import SCHEMA


def schema_properties(schema: dict[str, Any], where: str = "") -> Any:
    """(place, property, whether it is required) of every key of the schema, references followed."""
    if "$ref" in schema:
        return
    for key, item in schema.get("properties", {}).items():
        yield f"{where}{key}", item, key in schema.get("required", [])
        yield from schema_properties(item, f"{where}{key}.")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from schema_properties(schema["additionalProperties"], f"{where}*.")


def all_properties() -> list[tuple[str, dict[str, Any], bool]]:
    root = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    found = list(schema_properties(root))
    for name, item in root["$defs"].items():
        found += schema_properties(item, f"{name}: ")
    resolved = []
    for place, item, required in found:
        referred = root["$defs"][item["$ref"].rsplit("/", 1)[1]] if "$ref" in item else {}
        resolved.append((place, {**referred, **item}, required))
    return resolved


# Left out, these stand for "not given": a dataset or a source of another kind, a split without a file or a limit.
MAY_BE_ABSENT = (
    "model: source.", "dataset: source.", "dataset: files", "dataset: limit.", "dataset: database",
    "dataset: labels", "dataset: prompt", "dataset: completion", "dataset: system", "dataset: messages", "dataset: llama2_text",
    "dataset: slice", "dataset: labels",
)  # fmt: skip


@pytest.mark.parametrize(("place", "item", "required"), all_properties(), ids=[row[0] for row in all_properties()])
def test_every_key_of_the_schema_says_what_it_is(place, item, required):
    assert "type" in item or "enum" in item
    assert item.get("description", "").strip(), f"{SCHEMA.name}: {place} has no description"
    assert required or "default" in item or place.startswith(MAY_BE_ABSENT), f"{SCHEMA.name}: {place} has no default"


def test_every_mapping_of_the_schema_is_closed():
    def walk(item: Any, where: str) -> None:
        if isinstance(item, dict):
            if item.get("type") == "object" and "properties" in item:
                assert item.get("additionalProperties") is False, f"{where} takes any key"
            for key, value in item.items():
                walk(value, f"{where}.{key}")

    walk(yaml.safe_load(SCHEMA.read_text(encoding="utf-8")), "schema")


def test_every_pattern_says_in_words_what_it_takes():
    def walk(item: Any) -> None:
        if isinstance(item, dict):
            assert isinstance(item.get("title"), str) or not isinstance(item.get("pattern"), str), item
        for inner in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            walk(inner)

    walk(yaml.safe_load(SCHEMA.read_text(encoding="utf-8")))
