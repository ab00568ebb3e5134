"""Which files a ledger's database consists of: one, but for while a run goes on."""

import os

from seal_engine.loop.ledger import DATABASE, Ledger
from seal_engine.loop.records import Trial

CONFIG = {"rounds": 2}
TRIAL = Trial(0, "round 1", "a", 0, 0, 11, 10, 430, 0.5, None, ("yes",), (1.0,), 2.5)


def database_files(directory):
    return sorted(name for name in os.listdir(directory) if name.startswith(DATABASE))


def test_a_closed_run_is_one_file_also_after_it_was_read(tmp_path):
    """A reader of a file in WAL mode would make -wal and -shm again, and could not remove them."""
    run = tmp_path / "run"
    with Ledger.open(run, CONFIG) as ledger:
        ledger.finish("one", trials=[TRIAL])
        assert database_files(run) == [DATABASE, f"{DATABASE}-shm", f"{DATABASE}-wal"]  # readers need not wait
        with Ledger.read(run) as reader:
            assert reader.finished("one")
    assert database_files(run) == [DATABASE]
    with Ledger.read(run) as reader:
        assert reader.trials() == [TRIAL]
    assert database_files(run) == [DATABASE]


def test_a_run_that_is_read_while_it_closes_is_one_file_after_the_next_time(tmp_path):
    """The reader keeps what it needs, the run does not wait for it, and nothing that was finished is lost."""
    run = tmp_path / "run"
    with Ledger.open(run, CONFIG) as ledger:
        ledger.finish("one", trials=[TRIAL])
        reader = Ledger.read(run)
    assert len(database_files(run)) == 3
    assert reader.trials() == [TRIAL]
    reader.close()
    with Ledger.open(run, CONFIG) as ledger:
        assert ledger.trials() == [TRIAL]
    assert database_files(run) == [DATABASE]
