"""Benchmarks run under pytest-benchmark; each adds rows to a table that is printed and, with --record, kept."""

from pathlib import Path

import pytest

import measure

ROWS: dict[str, list[dict]] = {}


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, default=None, metavar="DIR", help="write one JSON file a benchmark to DIR")


@pytest.fixture
def record(request):
    """record(**columns) adds one row to the table of this benchmark file."""
    name = f"{Path(request.node.fspath).stem}_{measure.DEVICE.type}"
    return lambda **columns: ROWS.setdefault(name, []).append(columns)


def pytest_terminal_summary(terminalreporter, config):
    for name, rows in ROWS.items():
        terminalreporter.write_line("")
        terminalreporter.write_line(measure.report(name, rows, config.getoption("--record")))
