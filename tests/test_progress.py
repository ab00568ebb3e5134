"""Progress of a whole run beside that of its parts."""

from dataclasses import replace

from seal_engine import progress
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.restem import ReSTEM
from toy_loop import CONFIG, ToyDomain, ToyEngine


def run_lines(directory, config, monkeypatch, capsys):
    """The lines that a run of the toy loop writes to a log."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Ledger.open(directory, {"a": 1}) as ledger:
        ReSTEM(ToyEngine(), ToyDomain(), config, ledger, progress=True).run()
    return capsys.readouterr().err.splitlines()


def test_the_whole_run_is_reported_in_units(tmp_path, monkeypatch, capsys):
    """A seed has an evaluation first, and in each round one of training and one evaluation: 2 (1 + 2 * 1) = 6 units.

    A finished run has nothing to report.
    """
    config = replace(CONFIG, seeds=(0, 1), rounds=1)
    lines = run_lines(tmp_path / "run", config, monkeypatch, capsys)
    assert [line.partition(",")[0] for line in lines] == [f"Run: {done} of 6 units" for done in range(1, 7)]
    assert all(line.endswith(" s left") for line in lines)
    assert lines[-1].endswith("units, 0 s left")
    assert run_lines(tmp_path / "run", config, monkeypatch, capsys) == []
