"""The licences of what a run is made from, and what stands against publishing it, as far as the registries say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What the registries say under `publishing` → what is told of it.
TOLD = {
    "allowed": "allowed",
    "conditions": "under the licence's conditions",
    "forbidden": "forbidden",
    "unclear": "unclear",
}
Source = Mapping[str, Any]


def source_of(kind: str, name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """What is told of a model or a dataset of the registries: where it is from, its pin and its licence."""
    source = entry["source"]
    return {
        "kind": kind,
        "name": name,
        "address": source.get("hub") or source.get("path") or "made by this workflow",
        "hub": source.get("hub") or "",
        "pin": source.get("revision") or source.get("sha256") or "",
        "licence": entry["licence"],
        "publishing": entry["publishing"],
    }


def objections(sources: Sequence[Source]) -> Iterator[str]:
    """A line for each source whose licence does not simply allow that what is made of it is published."""
    for source in sources:
        what = f"{source['kind']} {source['name']} ({source['licence']})"
        if source["publishing"] == "forbidden":
            yield f"{what} forbids publishing what is made of it"
        elif source["publishing"] == "conditions":
            yield f"{what} allows publishing on conditions: read them first"
        elif source["publishing"] == "unclear":
            yield f"{what}: the registry does not say whether publishing is allowed; ask who holds the rights"
