"""Runs side by side: the table, one figure, and the settings that differ."""

import json
from dataclasses import replace

import pytest
from toy_runs import CONFIG, Page, ReportDomain, make_run

from seal_engine.cli.main import main
from seal_engine.loop.ledger import Ledger
from seal_engine.runs import rows


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two rounds and one of one round, with other settings, whose directories have one name."""
    home = tmp_path_factory.mktemp("compare")
    make_run(home / "a/run", replace(CONFIG, seeds=(0, 1), contexts=6), ReportDomain(6))
    make_run(home / "b/run", replace(CONFIG, seeds=(0, 1), contexts=6, rounds=1, temperature=0.5), ReportDomain(6))
    return home / "a/run", home / "b/run"


def test_two_runs(two, capsys):
    """What is printed and what the page says are the runs' own figures; both have their line in one picture."""
    assert main(["report", *map(str, two), "--json"]) == 0
    *lines, shown = capsys.readouterr().out.splitlines()
    values = json.loads(shown)
    assert lines[0].split() == ["method", "a/run", "b/run", "change"]
    page = Page(two[0] / "compare.html")
    assert values["report"] == str(two[0] / "compare.html")
    cells = page.cells()
    for directory, i in zip(two, (0, 1), strict=True):
        with Ledger.read(directory) as ledger:
            for row in rows(ledger):
                (line,) = [line for line in cells if line and line[0] == row.name]
                assert line[1 + i] == f"{100 * row.mean:.1f} ({100 * row.deviation:.1f})"
                (means,) = [entry["means"] for entry in values["table"] if entry["method"] == row.name]
                assert means[i] == row.mean
    assert tuple(
        cell for i, cell in enumerate(next(line for line in cells if line[0] == "self-edits, after round 2")) if i != 1
    ) == ("self-edits, after round 2", "-", "-")
    assert page.tags["svg"] == 1
    assert " a/run</text>" in page.source
    assert " b/run</text>" in page.source
    differing = {line[0] for line in cells if len(line) == 3}
    assert differing == {"rounds", "temperature"}
    assert ("temperature", "1.0", "0.5") in cells


def test_the_page_goes_where_it_is_wanted_and_is_the_same_each_time(two, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main(["report", *map(str, two), "--out", str(file), "--quiet"]) == 0
    first = file.read_bytes()
    assert main(["report", *map(str, two), "--out", str(file), "--quiet"]) == 0
    assert file.read_bytes() == first
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "{a}"], "accepted: different runs"),
        (["{a}", "{a}/absent"], "absent/ledger.sqlite: missing; accepted: the directory of a run"),
        (["{a}", "--out", "x.html"], "--out: found 'x.html'; accepted: nothing with one run"),
        (["{a}"] * 5, "accepted: 2 to 4 runs to compare"),
    ],
    ids=["one run twice", "no run", "one run and a page", "more lines than can be told apart"],
)
def test_mistakes(two, arguments, message, capsys):
    assert main(["report", *(argument.format(a=two[0]) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_runs_that_go_step_by_step_are_not_compared(two, tmp_path, capsys):
    with Ledger.open(tmp_path / "run", {"task": "continual"}):
        pass
    assert main(["report", str(two[0]), str(tmp_path / "run")]) == 2
    assert "found a run of continual; accepted: runs that go in rounds" in capsys.readouterr().err
