"""Benchmarks run under pytest-benchmark; each adds rows to a table that is printed and, with --record, kept."""

import sys
import traceback
from importlib import import_module
from pathlib import Path

import pytest

import measure

ROWS: dict[str, list[dict]] = {}


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, default=None, metavar="DIR", help="write one JSON file a benchmark to DIR")
    parser.addoption("--shape", default=None, metavar="S", help="only cases of this shape")
    parser.addoption("--passages", type=int, default=None, metavar="N", help="passages of bench_seal_round")
    parser.addoption("--tree", type=Path, default=None, metavar="DIR", help="measure the packages of another checkout")


def pytest_configure(config):
    """Puts the packages of --tree first, and makes sure that they are what is imported. Refuses unknown shapes."""
    tree, shape = config.getoption("--tree"), config.getoption("--shape")
    if tree is not None:
        tree = tree.resolve()
        sys.path[:0] = [str(tree), str(tree / "kernels")]
        for name in ("seal_engine", "seal_kernels"):
            file = Path(import_module(name).__file__ or "")
            if tree not in file.resolve().parents:
                raise pytest.UsageError(f"--tree {tree}: {name} is imported from {file}")
    if shape is not None:
        known = sorted(import_module("shapes").SHAPES)
        if shape not in known:
            raise pytest.UsageError(f"--shape: found {shape!r}; accepted: one of {known}")


def pytest_collection_modifyitems(config, items):
    """Leaves out cases of other shapes than --shape, and what has no shape."""
    shape = config.getoption("--shape")
    if shape is not None:
        items[:] = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("shape") == shape]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A benchmark that fails leaves its memory to the others: its frames hold the models that it made."""
    report = yield
    if call.excinfo is not None:
        traceback.clear_frames(call.excinfo.tb)
    return report


@pytest.fixture
def record(request):
    """record(**columns) adds one row to the table of this benchmark file. It is kept at once."""
    name = f"{Path(request.node.fspath).stem}_{measure.DEVICE.type}"
    directory = request.config.getoption("--record")

    def add(**columns):
        rows = ROWS.setdefault(name, [])
        rows.append(columns)
        if directory is not None:
            measure.report(name, rows, directory)

    return add


def pytest_terminal_summary(terminalreporter, config):
    for name, rows in ROWS.items():
        terminalreporter.write_line("")
        terminalreporter.write_line(measure.report(name, rows, config.getoption("--record")))
