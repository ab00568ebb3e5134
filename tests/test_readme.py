"""README's figures are those that are recorded, and its commands and files are there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
READER = runpy.run_path(str(ROOT / "benchmarks/readme.py"))
# What only a measurement gives: decimals, shares, rates and times.
MEASURED = re.compile(r"\d+\.\d+(?![.\d]|b\b)|\d+ ?%|\d[\d,.]* (?:tokens/s|GB/s|s\b|ms\b|seconds)|\d+(?:\.\d+)?x\b")


def outside_blocks(text):
    """README without its blocks, code and names of things that have numbers."""
    text = READER["BLOCK"].sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)|Python 3\.\d+ to 3\.\d+|Qwen2\.5", "", text)


def test_blocks_say_what_is_recorded():
    """`python benchmarks/readme.py` writes them anew."""
    assert READER["render"](README) == README


def test_every_block_is_there_once():
    assert sorted(found["name"] for found in READER["BLOCK"].finditer(README)) == sorted(READER["BLOCKS"])
    assert README.count("<!-- end -->") == len(READER["BLOCKS"])


def test_there_are_no_measured_figures_elsewhere():
    assert MEASURED.findall("it takes 63 s, 1.5x or 12% of 3.1") == ["63 s", "1.5", "12%", "3.1"]
    found = [line for line in outside_blocks(README).splitlines() if MEASURED.search(line)]
    assert not found


@pytest.mark.parametrize("path", re.findall(r"!?\[[^]]*\]\(((?!https?:)[^)]*)\)", README))
def test_files_that_are_linked_are_there(path):
    assert (ROOT / path).exists()
