"""The README says what is so."""

import re

from readme_results import ROOT, read_metrics, with_results

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_results_table_is_that_of_the_metrics() -> None:
    assert with_results(README, read_metrics()) == README, "run: .venv/bin/python tools/readme_results.py"
    assert README.count("| llama |") >= 9


def test_every_file_that_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists() and not link.startswith("results/report")]
    assert not missing


def test_every_make_target_that_it_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets
