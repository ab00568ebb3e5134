"""Recorded results as tables in Markdown."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DETAILS = "[docs/benchmarks.md](docs/benchmarks.md)"
SEEDS = {2: "two", 3: "three"}
Row = Mapping[str, Any]


def read(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A benchmark's rows, and the machine that they were measured on."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return found["rows"], found["machine"]


def pick(rows: Sequence[Row], /, **wanted: Any) -> Row:
    """The only row with these columns."""
    (row,) = (row for row in rows if all(row.get(name) == value for name, value in wanted.items()))
    return row


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *lines))


def source(name: str, machine: Mapping[str, Any], more: str = "") -> str:
    """Where figures are recorded, what recorded them, and on what."""
    bench = name.removesuffix("_cpu").removesuffix("_cuda").removesuffix("_cpu_amx")
    command = f".venv/bin/python -m pytest -p no:warnings benchmarks/{bench}.py{more} --record benchmarks/results"
    return recorded(name, machine, command)


def recorded(name: str, machine: Mapping[str, Any], command: str) -> str:
    """Where figures are recorded, and by what command on what machine."""
    where = f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}"
    if name.endswith("_amx"):
        where += "; the file renamed"  # the other CPU's has its name
    return prose(f"Recorded in `benchmarks/results/{name}.json` ({where}) by") + f"\n```\n{command}\n```\n"


def prose(text: str) -> str:
    """A paragraph after what is before it."""
    return f"\n{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}\n"


def percent(value: float) -> str:
    """Of 1, to a tenth."""
    return f"{100 * value:.1f}"


def rate(value: float) -> str:
    """Tokens a second, to three figures or more."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
