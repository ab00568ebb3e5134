"""Who did how much: kept beside the ledger, and shown in the report."""

from seal_engine.cluster.shares import WorkerShare, read_workers, record_workers
from seal_engine.report.workers import workers_table

SHARES = [WorkerShare("worker <0>", 1200, 3, 61.0, 0.5, 2), WorkerShare("worker 1", 7, 1, 2.0, 59.5, 0)]


def test_every_start_of_a_run_adds_its_workers(tmp_path):
    assert read_workers(tmp_path) == []
    record_workers(tmp_path, [])  # a run that had nothing to do started none
    assert list(tmp_path.iterdir()) == []
    record_workers(tmp_path, SHARES)
    record_workers(tmp_path, SHARES[:1])
    assert read_workers(tmp_path) == [*SHARES, SHARES[0]]


def test_the_table_has_a_line_for_each():
    assert workers_table([]) == ""
    shown = workers_table(SHARES)
    assert shown.count("<tr>") == 3
    assert "worker &lt;0&gt;" in shown
    assert "1,200" in shown
