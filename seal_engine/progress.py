"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines where stderr is no terminal


class Report(Protocol):
    """Takes the state of the work: how much is done, and a few words on it."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def reporting(total: int, unit: str, title: str, enabled: bool, initial: int = 0) -> Iterator[Report]:
    """Gives a function that reports progress on stderr, after a second of work at the earliest.

    On a terminal that is a bar, which vanishes at the end; elsewhere a line every LINE_SECONDS. enabled False: nothing.
    initial: how much was done before, from which the time that is left does not follow.
    """
    if not enabled or sys.stderr is None or not sys.stderr.isatty():
        yield _lines(total, unit, title, initial) if enabled and sys.stderr is not None else lambda done, note="": None
        return
    with tqdm(total=total, unit=unit, desc=title, initial=initial, delay=1.0, leave=False) as bar:

        def report(done: int, note: str = "") -> None:
            bar.n = done
            bar.set_postfix_str(note, refresh=False)
            bar.update(0)

        yield report


def write_line(text: str) -> None:
    """Print a line on stdout, above the bars that are on the terminal."""
    tqdm.write(text)


def _lines(total: int, unit: str, title: str, initial: int) -> Report:
    start = last = monotonic()

    def report(done: int, note: str = "") -> None:
        nonlocal last
        if monotonic() - last >= LINE_SECONDS:
            last = monotonic()
            left = (last - start) * (total - done) / (done - initial) if done > initial else None
            parts = [f"{title}: {done} of {total} {unit}s", note, "" if left is None else f"{left:.0f} s left"]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    return report
