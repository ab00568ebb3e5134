"""Runs of earlier versions of the ledger go on, and what later versions record."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from seal_engine.loop.ledger import DATABASE, Ledger
from seal_engine.loop.records import PolicyUpdate, SelfEdit, Trial, loss_curve

CONFIG = {"seeds": [0, 1], "learning_rate": 1e-3}
EDIT = SelfEdit(0, "round 1", "a", 2, "A fact.", (5, 3, 8), 7, 2, None)
TRIAL = Trial(0, "round 1", "a", 2, 1, 11, 10, 430, 0.5, None, ("yes", "no"), (1.0, None), 2.5)
POLICY = PolicyUpdate(0, 1, "policies/seed-0-round-1", (("a", 2), ("b", 0)), 20, 0.5, 60.0)
VERSION_2 = """
ALTER TABLE steps DROP COLUMN cpu_seconds;
ALTER TABLE trials DROP COLUMN losses;
ALTER TABLE policies DROP COLUMN losses;
UPDATE run SET schema_version = 2;
"""
VERSION_1 = f"""
{VERSION_2}
ALTER TABLE steps RENAME COLUMN step TO unit;
ALTER TABLE steps RENAME TO units;
ALTER TABLE metrics RENAME COLUMN step TO unit;
ALTER TABLE self_edits RENAME COLUMN step TO unit;
ALTER TABLE self_edits RENAME COLUMN rejected TO refused;
ALTER TABLE trials RENAME COLUMN step TO unit;
ALTER TABLE policies RENAME COLUMN step TO unit;
DROP INDEX self_edits_step;
DROP INDEX trials_step;
DROP INDEX policies_step;
CREATE INDEX self_edits_unit ON self_edits (unit);
CREATE INDEX trials_unit ON trials (unit);
CREATE INDEX policies_unit ON policies (unit);
UPDATE metrics SET name = 'refused' WHERE name = 'rejected';
"""


def test_a_run_of_the_first_version_goes_on(tmp_path):
    """Reading leaves it as it was; going on with it brings tables, metrics and names of settings up to date."""
    config, old = {"trials_per_step": 9, "rounds": 2}, {"trials_a_unit": 9, "rounds": 2}
    with Ledger.open(tmp_path / "run", config) as ledger:
        rejected = replace(EDIT, rejected="no text")
        ledger.finish("one", self_edits=[rejected], trials=[TRIAL], metrics={"rejected": 1, "accuracy": 0.5})
        expected, columns = ledger.snapshot(), schema(tmp_path / "run")
    with closing(sqlite3.connect(tmp_path / "run" / DATABASE, isolation_level=None)) as connection:
        connection.executescript(VERSION_1)
        connection.execute("UPDATE run SET schema_version = 1, config = ?", [json.dumps(old)])
    before = (tmp_path / "run" / DATABASE).read_bytes()
    with Ledger.read(tmp_path / "run") as ledger:
        assert ledger.snapshot() == expected
    assert before == (tmp_path / "run" / DATABASE).read_bytes()
    for _ in range(2):
        with Ledger.open(tmp_path / "run", config) as ledger:
            assert ledger.finished("one")
            assert ledger.snapshot() == expected
    assert schema(tmp_path / "run") == columns


def test_a_run_from_before_loss_curves_and_cpu_time_goes_on(tmp_path):
    """Version 2 lacks three columns: what it recorded has no curves and no CPU time, what it records now has both."""
    run, curve = tmp_path / "run", (3.5, 0.25)
    with Ledger.open(run, CONFIG) as ledger:
        ledger.finish("one", trials=[replace(TRIAL, losses=curve)], policy=replace(POLICY, losses=curve))
        columns = schema(run)
    with closing(sqlite3.connect(run / DATABASE, isolation_level=None)) as connection:
        connection.executescript(VERSION_2)
    with Ledger.open(run, CONFIG) as ledger:
        assert (ledger.trials(), ledger.policies()) == ([TRIAL], [POLICY])
        ledger.finish("two", trials=[replace(TRIAL, repeat=2, losses=curve)])
        assert [trial.losses for trial in ledger.trials()] == [(), curve]
        ((_, _, _, before), (_, _, _, after)) = ledger.steps()
        assert before is None
        assert after is not None
        assert after >= 0
    assert schema(run) == columns


def test_loss_curves_are_short_and_keep_their_course():
    """40 steps in 16 parts of 2 or 3 steps: the first has steps 1 and 2, the last 38 to 40, and no step is left out."""
    assert loss_curve([]) == ()
    assert loss_curve([2.0, 1.0 / 3]) == (2.0, 0.3333)
    curve = loss_curve([float(i) for i in range(1, 41)])
    assert len(curve) == 16
    assert (curve[0], curve[-1]) == (1.5, 39.0)
    assert list(curve) == sorted(curve)


def schema(directory: Path) -> list[tuple[str, str]]:
    """(table, column) of a run's database, and its indexes."""
    with closing(sqlite3.connect(directory / DATABASE)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(t, row[1]) for t in sorted(tables) for row in connection.execute(f"PRAGMA table_info({t})")]
        query = "SELECT tbl_name, name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
        return columns + list(connection.execute(query))
