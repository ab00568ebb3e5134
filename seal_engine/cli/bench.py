"""The verb that measures: benchmarks of a checkout, after their tests, and two revisions side by side."""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seal_engine.errors import RunError
from seal_engine.files import read_json
from seal_engine.types import InputError, require

ROOT = Path(__file__).parents[2]
# Whose tests a benchmark relies on that has none of its own name.
TESTS = {
    "cluster": ["dispatch", "pool"],
    "decode": ["sampler", "packed"],
    "demo": ["tiny"],
    "demo_few_shot": ["tiny_puzzles"],
    "demo_real": ["real"],
    "neighbour": ["threads"],
    "profile": ["train", "sampler"],
    "sample": ["sampler", "scheduler", "text"],
    "scaling": ["train"],
    "seal_round": ["train", "sampler", "bench"],
    "serve": ["openai_api", "seal_socket", "worker"],
    "tinker": ["tinker_sdk", "tinker_wire"],
}
SPEEDS = ("tokens_per_s",)
MEASURES = ("seconds", "ms", "us", *SPEEDS)  # what revisions are compared by: the first that a row has


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    what = "benchmarks/bench_WHAT.py: train, sample, seal_round, lora, ... (default: train)"
    parser.add_argument("what", help=what, nargs="*", default=["train"], metavar="WHAT")
    parser.add_argument("--shape", help="only cases of this shape; seal_round takes any of benchmarks/shapes.py")
    parser.add_argument("--passages", help="passages of seal_round", type=int, metavar="N")
    parser.add_argument("--record", help="keep the results, a JSON file each", metavar="DIR")
    parser.add_argument("--compare", help="measure this git revision's packages too, in turns", metavar="REV")
    parser.add_argument("--json", help="nothing but the line of JSON on stdout", action="store_true")


def bench(options: argparse.Namespace) -> None:
    """Measure this checkout on this machine: its tests first, then speed, beside what else there is."""
    names, revision, place = list(dict.fromkeys(options.what)), options.compare, Path(options.record or ".")
    tests = list(dict.fromkeys(file for name in names for file in tests_of(name)))
    require(options.passages is None or options.passages >= 1, "--passages", options.passages, "an integer >= 1")
    require(place.is_dir() or not place.exists(), "--record", options.record, "a directory")
    if find_spec("pytest_benchmark") is None:
        raise InputError("bench: found no pytest-benchmark; accepted: an environment with the extra 'test'")
    commit = None if revision is None else find_commit(revision)
    given = [f"--{key}={getattr(options, key)}" for key in ("shape", "passages") if getattr(options, key) is not None]
    for name in names if given else ():
        _run(name, given, ROOT, "--collect-only")  # before the tests take their time
    status, lines = _pytest(["-x", *tests], ROOT)
    if status:
        raise RunError(f"nothing is measured, as tests fail: {_reason(lines)}")
    table, found = runpy.run_path(str(ROOT / "benchmarks/measure.py"))["table"], []
    for name in names:
        with tempfile.TemporaryDirectory() as out:
            if commit is None:
                result = measure(name, given, ROOT, Path(out))
            else:
                result = compare(name, given, commit, str(revision))
                (Path(out) / f"{result['benchmark']}.json").write_text(json.dumps(result, indent=1) + "\n")
            if options.record is not None:
                _keep(Path(out), place)
        found.append(result)
        if not options.json:
            print(f"{result['benchmark']}: " + ", ".join(map(str, result["machine"].values())))
            print(table(result["rows"]))
    print(json.dumps({"benchmarks": found}))


def _keep(out: Path, place: Path) -> None:
    """Copy what was recorded. InputError where it cannot be written."""
    try:
        shutil.copytree(out, place, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise InputError(f"--record: {place}: cannot be written: {error}") from None


def tests_of(name: str) -> list[str]:
    """The test files of a benchmark. InputError for one that is not there, or that nothing tests."""
    known = sorted(file.stem.removeprefix("bench_") for file in (ROOT / "benchmarks").glob("bench_*.py"))
    if not known:
        raise InputError(f"bench: found no benchmarks in {ROOT}; accepted: a checkout of the repository")
    require(name in known, "bench", name, f"one of {known}")
    stems = TESTS.get(name, [name])
    files = [file for stem in stems for file in sorted((ROOT / "tests").rglob(f"test_{stem}.py"))]
    require(bool(files), f"bench {name}", "no tests", f"test_{name}.py in tests or a folder of it")
    return [str(file.relative_to(ROOT)) for file in files]


def measure(name: str, given: Sequence[str], tree: Path, out: Path) -> dict[str, Any]:
    """What a benchmark of this checkout records, in `out`, about the packages in `tree`."""
    _run(name, given, tree, "--record", str(out))
    files = list(out.glob("*.json"))
    if not files:
        raise InputError(f"bench {name}: found no case for this machine; accepted: another benchmark")
    return read_json(files[0])


def _run(name: str, given: Sequence[str], tree: Path, *further: str) -> None:
    """Run a benchmark. InputError for settings that it refuses, RunError if it fails."""
    options = ["-p", "no:warnings", "--tree", str(tree), *given, *further]
    status, lines = _pytest([f"benchmarks/bench_{name}.py", *options], tree)
    if status == 5:
        raise InputError(f"bench {name}: found no case with {' '.join(given)}")
    if status:
        raise (InputError if status == 4 else RunError)(f"bench {name}: {_reason(lines).removeprefix('ERROR: ')}")


def _pytest(arguments: Sequence[str], tree: Path) -> tuple[int, list[str]]:
    """Run pytest in this checkout on the packages in `tree`; its exit status, and what it printed."""
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()


def _reason(lines: Sequence[str]) -> str:
    """The line that says why pytest failed."""
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "no output")


def compare(name: str, given: Sequence[str], commit: str, revision: str) -> dict[str, Any]:
    """A benchmark's rows with what both revisions measured, the better of two turns each: A B B A."""
    with worktree(commit) as tree:
        turns = []
        for side in (tree, ROOT, ROOT, tree):
            with tempfile.TemporaryDirectory() as out:
                turns.append(measure(name, given, side, Path(out)))
    first, second, third, fourth = (keyed(turn["rows"]) for turn in turns)
    rows = []
    for key, row in second.items():
        what = next((column for column in MEASURES if column in row), None)
        if what is None or not all(key in turn for turn in (first, third, fourth)):
            continue
        best = max if what in SPEEDS else min
        before, after = best(first[key][what], fourth[key][what]), best(row[what], third[key][what])
        settings = {column: value for column, value in row.items() if isinstance(value, str | int)}
        faster = after / before if what in SPEEDS else before / after
        rows.append({**settings, f"{what}, {revision}": before, f"{what}, here": after, "times_faster": faster})
    return {**turns[1], "benchmark": f"{turns[1]['benchmark']}_compared", "compared_with": commit, "rows": rows}


def keyed(rows: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Rows by their texts; of those with the same, which one it is. What limits a kernel is measured, so left out."""
    seen: Counter[Any] = Counter()
    found = {}
    for row in rows:
        texts = tuple((column, value) for column, value in row.items() if isinstance(value, str) and column != "limit")
        found[texts, seen[texts]] = row
        seen[texts] += 1
    return found


def find_commit(revision: str) -> str:
    """The commit that a revision names. InputError if there is none."""
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    require(done.returncode == 0, "--compare", revision, f"a git revision of {ROOT}")
    return done.stdout.strip()


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A commit's files in a temporary directory, which is gone afterwards, and git knows."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place).resolve() / "tree"
        try:
            done = _git("worktree", "add", "--detach", str(tree), commit)
            if done.returncode:
                raise RunError(f"--compare: {done.stderr.strip()}")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"--compare: git cannot be run: {error}") from None
