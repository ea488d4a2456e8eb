"""The table says what was measured, in medians, with ratios within a round, and what was not."""

import pytest
from gpu_lines import PAIR, THREE, line

from table import PAGE, RESULTS, card_of, conditions, lines_of, ratios, table, with_table


def test_ratios_are_of_one_round_and_so_of_one_stint() -> None:
    lines = [line("ours", 1, 0, 100), line("trl", 1, 0, 50), line("ours", 2, 1, 400), line("trl", 3, 2, 10)]
    assert ratios(lines, "ours", "trl") == [[2.0]]
    lines += [line("ours", 3, 2, 40), line("ours", 3, 3, 60), line("trl", 3, 3, 10)]
    assert ratios(lines, "ours", "trl") == [[2.0], [4.0, 6.0]]


def test_a_ratio_of_a_single_round_says_so() -> None:
    lines = [line("ours", 1, 0, 100), line("trl", 1, 0, 50), line("ours", 1, 1, 400)]
    assert table([PAIR], lines).splitlines()[-1].endswith("| 1 in 1 process | H100 | 2.00 × (1 round) |")
    lines += [line("ours", 2, 2, 30), line("trl", 2, 2, 10)]
    assert table([PAIR], lines).splitlines()[-1].endswith("| 2 in 2 processes | H100 | 2.50 × |")
    assert table([PAIR], lines[1:3]).splitlines()[-1].endswith("| 1 in 1 process | H100 |  |")  # no round has both


def test_the_table_has_medians_ranges_failures_and_gaps() -> None:
    lines = [line("ours", 1, number, speed) for number, speed in enumerate((1000, 1200, 1100))]
    lines += [line("trl", 1, number, 500) for number in range(3)]
    failed = {"group": "three", "way": "unsloth", "stint": 1, "round": 0, "failed": "status 1: a | b"}
    shown = table([PAIR, THREE], [*lines, failed]).splitlines()
    assert shown[2:] == [
        "| pair | ours | 1,100 (1,000–1,200) | 0.500 | 5.0 | 6.0 | 3 in 3 processes | H100 |  |",
        "| pair | trl, batch 8 | 500 (500–500) | 0.500 | 5.0 | 6.0 | 3 in 3 processes | H100 | 2.20 × |",
        "| three | ours | not run |  |  |  |  |  |  |",
        "| three | unsloth | failed: status 1: a / b |  |  |  |  |  |  |",
        "| three | notebook, batch 2 | not run |  |  |  |  |  |  |",
    ]


def test_the_page_says_what_was_measured_on() -> None:
    about = {"name": "A card", "power.limit": "700 W"}
    lines = [
        {**line("ours", 1, 0, 9), "gpu after": {**about, "clocks.sm": f"{clock} MHz"}, "versions": {"torch": "2.11.0"}}
        for clock in (1500, 1980, 1700)
    ]
    card = "Random weights and tokens; 1 stint on A card (limit 700 W)"
    said = f"{card}; SM clock afterwards, not while measured: 1,500–1,980 MHz; torch 2.11.0"
    assert conditions(lines) == f"{said}."
    named = [
        *lines[:1],
        *({**found, "commit": commit} for found, commit in zip(lines[1:], ("a" * 40, None), strict=True)),
    ]
    assert conditions(named) == f"{said}; commit aaaaaaaaaa."
    lines[0]["gpu after"]["driver_version"] = "570.1"
    for found, pace in zip(lines[:2], (1500.0, 1700.0), strict=True):
        found["gpu during"] = {"SM clock MHz": pace, "power W": 690.0, "samples": 8}
    pace = "SM clock while measured 1,600 (1,500–1,700) MHz; power while measured 690 (690–690) W"
    later = "SM clock afterwards, not while measured: 1,700–1,700 MHz; driver 570.1; torch 2.11.0"
    assert conditions(lines) == f"{card}; {pace}; {later}."


def test_the_page_has_the_table_of_the_committed_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, lines_of(RESULTS)) == page, "run: .venv/bin/python benchmarks/gpu/table.py"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4"),
    ],
)
def test_cards_have_short_names(name: str, short: str) -> None:
    assert card_of({"gpu after": {"name": name}}) == short


def test_figures_of_two_cards_are_not_mixed() -> None:
    other = {"gpu after": {"name": "NVIDIA H200"}}
    lines = [line("ours", 1, 0, 100), line("trl", 1, 0, 50), line("ours", 2, 1, 300, **other)]
    lines.append(line("trl", 2, 1, 100, **other))
    shown = table([PAIR], lines).splitlines()
    assert shown[2].startswith("| pair | ours | 300 (300–300) | 0.500 | 5.0 | 6.0 | 1 in 1 process | H200 |")
    assert shown[3].endswith("| H200 | 3.00 × (1 round) |")


def test_a_process_counts_once_in_the_medians_and_its_repeats_are_the_range() -> None:
    lines = [line("ours", 1, 0, 100, repeats=[90, 100, 130]), line("trl", 1, 0, 50, repeats=[40, 50, 60])]
    shown = table([PAIR], [*lines, line("ours", 1, 1, 400, **{"seconds a step": 0.2})]).splitlines()
    assert shown[2].startswith("| pair | ours | 250 (90–400) | 0.350 | 5.0 | 6.0 | 4 in 2 processes | H100 |")
    assert shown[3].endswith("| 3 in 1 process | H100 | 2.00 × (1 round) |")
