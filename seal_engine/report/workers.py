"""Which worker did how much of a run that had some."""

from collections.abc import Sequence

from seal_engine.cluster.shares import WorkerShare
from seal_engine.report.html import cut, duration, table

HEADS = ("worker", "items", "batches", "at work", "idle", "restarts")
NOTE = (
    "Items are adapters trained and asked, policy updates and samples; equal ones count once. Idle: while a list of "
    "items was worked on, and the worker had none. A line per start of the run, but for drivers that were killed."
)


def workers_table(shares: Sequence[WorkerShare]) -> str:
    """A table; nothing for a run without workers."""
    lines = [
        (
            cut(share.name, 200),
            f"{share.items:,}",
            f"{share.batches:,}",
            duration(share.busy_seconds),
            duration(share.idle_seconds),
            str(share.restarts),
        )
        for share in shares
    ]
    note = f'<p class="note">{NOTE}</p>\n'
    return f"<h3>Workers</h3>\n{table(HEADS, lines, range(1, 6))}{note}" if lines else ""
