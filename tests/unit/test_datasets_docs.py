"""The examples of docs/datasets.md do what the page says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora.config import checked_config
from qlora.conversations import conversation, unusable

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```\n```json\n(.*?)```\n```text\n(.*?)\n```", PAGE, re.DOTALL)


def config_with(dataset: dict[str, Any], mixtures: dict[str, Any]) -> dict[str, Any]:
    names = {name for mixture in mixtures.values() for name in mixture["datasets"]}
    entry = {"source": {"path": "rows.jsonl"}, **dataset}
    return checked_config(
        {
            "models": {"tiny": {"source": {"path": "model"}}},
            "datasets": dict.fromkeys(names, entry),
            "mixtures": mixtures,
            "recipes": {"short": {}},
            "runs": [{"name": "one", "model": "tiny", "mixture": next(iter(mixtures)), "recipe": "short"}],
            "suites": {"held-out": {"datasets": list(names)}},
        }
    )


@pytest.mark.parametrize(
    ("entry", "row", "shown"), EXAMPLES, ids=[entry[:20].split(":")[0] for entry, _, _ in EXAMPLES]
)
def test_mapping_makes_of_the_row_what_the_page_shows(entry, row, shown):
    config = config_with(yaml.safe_load(entry), {"all": {"datasets": {"mine": {}}}})
    messages = conversation(json.loads(row), config["datasets"]["mine"], "rows.jsonl, row 1")
    assert "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages) == shown
    assert unusable(messages) is None


def test_page_has_an_example_of_each_mapping_and_of_a_mixture():
    assert len(EXAMPLES) == 6
    (mixture,) = re.findall(r"```yaml\n# mixtures:\n(.*?)```", PAGE, re.DOTALL)
    assert config_with({"messages": "turns"}, yaml.safe_load(mixture))["mixtures"]["all"]["datasets"]["chat"] == {
        "weight": 0.5,
        "cap": 2000,
    }
