"""The figures of README and docs/benchmarks.md are those that are recorded; what README shows works as pasted."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

import plot
from seal_engine.cli.main import main
from seal_engine.svg import standalone

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WRITER = runpy.run_path(str(ROOT / "benchmarks/readme.py"))
PAGES = sorted(WRITER["PAGES"])
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What only a measurement gives: decimals, shares, rates and times.
MEASURED = re.compile(r"\d+\.\d+(?![.\d]|b\b)|\d+ ?%|\d[\d,.]* (?:tokens/s|GB/s|s\b|ms\b|seconds)|\d+(?:\.\d+)?x\b")


def outside_blocks(text):
    """The page without its blocks, code and names of things that have numbers."""
    text = WRITER["BLOCK"].sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)|Python 3\.\d+ to 3\.\d+|Qwen2\.5", "", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_say_what_is_recorded(page):
    """`python benchmarks/readme.py` writes them anew."""
    assert WRITER["render"](page) == page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_there_once(page):
    blocks, text = WRITER["PAGES"][page], page.read_text()
    assert sorted(match["name"] for match in WRITER["BLOCK"].finditer(text)) == sorted(blocks)
    assert text.count("<!-- end -->") == len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_there_are_no_measured_figures_elsewhere(page):
    assert MEASURED.findall("it takes 63 s, 1.5x or 12% of 3.1") == ["63 s", "1.5", "12%", "3.1"]
    assert [line for line in outside_blocks(page.read_text()).splitlines() if MEASURED.search(line)] == []


@pytest.mark.parametrize("name", plot.PICTURES)
def test_pictures_show_what_is_recorded(name):
    """`python benchmarks/plot.py` draws them anew, without a measurement."""
    assert standalone(plot.PICTURES[name]()) == (plot.RESULTS / f"{name}.svg").read_bytes()


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


LINKS = [(d, link) for d in DOCUMENTS for link in re.findall(r"!?\[[^]]*\]\(((?!https?:)[^)]*)\)", d.read_text())]


@pytest.mark.parametrize(("document", "link"), LINKS, ids=[f"{d.name}:{link}" for d, link in LINKS])
def test_files_that_are_linked_are_there(document, link):
    assert (document.parent / link.partition("#")[0]).exists()


def test_the_tree_names_every_file():
    """Files of seal_engine stand in README's tree, those of the two tasks and the server by their folder at least."""
    tree = README[README.index("## The tree") :]
    for file in sorted((ROOT / "seal_engine").rglob("*.py")):
        if not file.name.startswith("__"):
            folder = str(file.parent.relative_to(ROOT / "seal_engine")) + "/"
            assert file.name in tree or (folder in tree and folder.startswith(("domains/", "serve/", "tiny/"))), file


def test_the_snippets_run_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, names)
    trained, base = capsys.readouterr().out.split("|")
    assert trained.strip() == "coins"
    assert base.strip() != "coins"
    assert (tmp_path / "merged/model.safetensors").exists()


def test_the_smallest_data_file_works(tmp_path, monkeypatch):
    """docs/tasks.md shows a file and a command; from the repository's root, as there."""
    text = (ROOT / "docs/tasks.md").read_text()
    (tmp_path / "passages.json").write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    command = re.search(r"\.venv/bin/seal-engine (run knowledge --model seal_engine/tiny.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seal_engine").symlink_to(ROOT / "seal_engine")
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    assert (tmp_path / "runs/try/report.html").exists()
