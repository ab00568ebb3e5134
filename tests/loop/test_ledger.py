"""The ledger: what a run has finished survives kill -9 at any moment, full disks and other mistakes."""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_engine import InputError
from seal_engine.loop.database import SCHEMA_VERSION
from seal_engine.loop.ledger import DATABASE, LOCK, METRICS, Ledger
from seal_engine.loop.records import PolicyUpdate, SelfEdit, Trial

CONFIG = {"seeds": [0, 1], "lora": {"r": 32, "targets": ["q_proj", "v_proj"]}, "learning_rate": 1e-3}
EDIT = SelfEdit(0, "round 1", "Käse", 2, "A fact.\n---\nAnother.", (5, 3, 8), 7, 2, None)
TRIAL = Trial(0, "round 1", "Käse", 2, 1, 11, 10, 430, 0.1 + 0.2, None, ("yes", "no"), (1.0, None), 2.5)
POLICY = PolicyUpdate(0, 1, "policies/seed-0-round-1", (("Käse", 2), ("b", 0)), 20, 0.5, 60.0)
STEPS = 60


def work(directory: Path) -> None:
    """A run as the outer loop does it: steps of self-edits, trials and policies, all following from their numbers."""
    with Ledger.open(directory, CONFIG) as ledger:
        for n in range(STEPS):
            step, draw = f"step {n}", random.Random(n)
            if ledger.finished(step):
                continue
            if n % 5 == 4:
                final = ledger.policy_directory(0, n)
                ledger.replace_directory(final, lambda path, n=n: [(path / f"{i}").write_text(f"{n}") for i in "ab"])
                path = str(final.relative_to(ledger.directory))
                policy = replace(POLICY, round=n, path=path, final_loss=draw.random(), seconds=time.monotonic())
                ledger.finish(step, policy=policy)
            else:
                edits = [replace(EDIT, phase=step, index=i, text="x" * draw.randrange(9000)) for i in range(3)]
                trials = [
                    replace(TRIAL, phase=step, index=i, final_loss=draw.choice([draw.random(), math.nan, None]))
                    for i in range(3)
                ]
                metrics = {"accuracy": draw.random(), "loss": math.nan, "n": n, "tokens_per_second": time.monotonic()}
                ledger.finish(step, self_edits=edits, trials=trials, metrics=metrics if n % 3 else None)
            with (directory.parent / f"{directory.name} acknowledged").open("a") as stream:
                stream.write(f"{step}\n")


def forked(function: Callable[[], object]) -> int:
    """The pid of a copy of this process that calls function and then ends, with status 1 if it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads: torch's, which the copy leaves alone
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    finally:
        os._exit(status)


def lines(directory: Path) -> list[dict]:
    """metrics.jsonl without times, NaN as text."""
    entries = [json.loads(line, parse_constant=str) for line in (directory / METRICS).read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("finished", "tokens_per_second")} for entry in entries]


def check_whole(directory: Path) -> None:
    """What must hold at every moment: nothing acknowledged is lost, a policy that is recorded or in place is whole."""
    for policy in (directory / "policies").glob("seed*"):
        assert sorted(file.read_text() for file in policy.iterdir()) == [policy.name.split("-")[-1]] * 2
    acknowledged = directory.parent / f"{directory.name} acknowledged"
    if acknowledged.exists():
        with Ledger.read(directory) as ledger:
            steps = acknowledged.read_text().splitlines()
            assert all(map(ledger.finished, steps))
            assert len(set(steps)) == len(steps)
            assert all((directory / policy.path / "b").exists() for policy in ledger.policies() if policy.path)


def assert_equal_runs(directory: Path, other: Path) -> None:
    with Ledger.read(directory) as ledger, Ledger.read(other) as reference:
        assert ledger.snapshot() == reference.snapshot()
        assert len(ledger.snapshot()["steps"]) == STEPS
    assert lines(directory) == lines(other)
    with Ledger.open(directory, CONFIG) as ledger:
        assert (directory / METRICS).read_text() == "".join(json.dumps(entry) + "\n" for entry in ledger.metrics())
    names = [  # but for what SQLite leaves where someone has read
        sorted(str(path.relative_to(d)) for path in d.rglob("*") if path.suffix not in (".sqlite-shm", ".sqlite-wal"))
        for d in (directory, other)
    ]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run's directory, and the seconds that it took."""
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    start = time.monotonic()
    work(directory)
    return directory, time.monotonic() - start


def test_killed_at_random_moments(uninterrupted, tmp_path):
    reference, seconds = uninterrupted
    killed, run, draw = 0, 0, random.Random(0)
    while killed < 30:
        directory = tmp_path / f"run {run}"
        pid = forked(lambda directory=directory: work(directory))
        time.sleep(draw.uniform(0, seconds / 5))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        check_whole(directory)
        if status == signal.SIGKILL:
            killed += 1
        else:
            assert status == 0
            assert_equal_runs(directory, reference)
            run += 1
    work(directory)
    assert_equal_runs(directory, reference)


def dying(function: Callable[[], object], after: int) -> Callable[[], object]:
    """The function, killed after so many lines of Python, of any file: also where no clock would hit."""
    done = 0

    def trace(frame, event, _):
        nonlocal done
        done += 1
        if done >= after:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def call() -> None:
        sys.settrace(trace)
        function()

    return call


def test_killed_at_lines(uninterrupted, tmp_path):
    draw = random.Random(0)
    for limit in [draw.randrange(1, 300) for _ in range(25)] + [draw.randrange(1, 15000) for _ in range(30)]:
        os.waitpid(forked(dying(lambda: work(tmp_path / "run"), limit)), 0)
        check_whole(tmp_path / "run")
    work(tmp_path / "run")
    assert_equal_runs(tmp_path / "run", uninterrupted[0])


def test_killed_while_replacing_a_directory(tmp_path):
    """Wherever it happens, what was there before is there, or what comes after, or nothing."""
    final = tmp_path / "run" / "policies" / "seed-0-round-1"
    seen = set()

    def put(text: str) -> None:
        ledger.replace_directory(final, lambda path: [(path / name).write_text(text) for name in ("a", "b")])

    with Ledger.open(tmp_path / "run", CONFIG) as ledger:
        for limit in range(1, 10000, 37):
            put("old")
            pid = forked(dying(lambda: put("new"), limit))
            status = os.waitpid(pid, 0)[1]
            files = sorted((path.name, path.read_text()) for path in final.iterdir()) if final.exists() else []
            assert files in ([], [("a", "old"), ("b", "old")], [("a", "new"), ("b", "new")])
            seen.add(str(files))
            if status == 0:
                break
    assert len(seen) == 3
    Ledger.open(tmp_path / "run", CONFIG).close()
    assert list(final.parent.iterdir()) == [final]


FULL_CONTENTS = {"self_edits": [EDIT], "trials": [TRIAL], "policy": POLICY, "metrics": {"accuracy": 0.5, "note": "ok"}}


@pytest.fixture
def run(tmp_path):
    """A run directory with one finished step, "one", that nobody holds."""
    with Ledger.open(tmp_path / "run", CONFIG) as ledger:
        ledger.finish("one", **FULL_CONTENTS)
    return tmp_path / "run"


def assert_intact(directory: Path) -> None:
    """The run fixture's directory, as it was; it can be gone on with."""
    with Ledger.open(directory, CONFIG) as ledger:
        assert ledger.self_edits() == [EDIT]
        assert ledger.trials() == [TRIAL]
        assert ledger.policies() == [POLICY]
        assert [entry["step"] for entry in ledger.metrics()] == ["one"]
        ledger.finish("after", metrics={"accuracy": 1})
        assert [entry["step"] for entry in lines(directory)] == ["one", "after"]


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files but the lock."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_ledger(run):
    with Ledger.open(run, CONFIG) as ledger:
        assert ledger.directory == run
        assert ledger.config == CONFIG
        assert ledger.finished("one")
        assert not ledger.finished("two")
        second = replace(TRIAL, seed=1, phase="round 2", repeat=0)
        first = replace(second, context="A")
        ledger.finish("two", trials=[second, first])
        assert ledger.trials() == [TRIAL, first, second]
        assert ledger.trials(seed=1) == ledger.trials(phase="round 2") == [first, second]
        assert ledger.trials(seed=0, phase="round 2") == []
        assert ledger.self_edits(seed=0, phase="round 1") == [EDIT]
        assert ledger.policies(1) == []
        contents = ledger.snapshot()
    assert contents["steps"] == {"one": {"accuracy": 0.5, "note": "ok"}, "two": {}}
    trial = asdict(TRIAL)
    del trial["seconds"]
    assert contents["trials"][0] == json.loads(json.dumps(trial))
    assert contents["config"] == CONFIG
    assert "seconds" not in contents["policies"][0]
    json.dumps(contents, allow_nan=False)
    ledger.close()  # twice does nothing


def test_tables_for_people(run):
    with closing(sqlite3.connect(run / DATABASE)) as connection:
        query = "SELECT step, steps.seconds >= 0, finished, trials.context, trials.final_loss FROM trials"
        [(step, timed, finished, context, loss)] = connection.execute(f"{query} JOIN steps USING (step)")
        assert (step, timed, context, loss) == ("one", 1, "Käse", TRIAL.final_loss)
        assert finished.endswith("+00:00")
        query = "SELECT answer.value FROM trials, json_each(trials.answers) AS answer"
        assert connection.execute(query).fetchall() == [("yes",), ("no",)]
        assert connection.execute("SELECT name, value FROM metrics").fetchall() == [("accuracy", 0.5), ("note", "ok")]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # see test_ledger_files.py
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT schema_version FROM run").fetchone() == (SCHEMA_VERSION,)


def test_accuracy():
    assert TRIAL.accuracy == 1.0
    assert replace(TRIAL, grades=(1.0, 0.0, None, 0.5)).accuracy == 0.5
    assert replace(TRIAL, grades=(None,)).accuracy is None
    assert replace(TRIAL, error="diverged").accuracy == 0.0


def test_nan_and_none(run):
    """NaN is kept apart from None, and from text; SQL's averages leave both out."""
    values = {"nan": math.nan, "none": None, "text": "NaN", "infinity": -math.inf, "integer": 2**63 - 1, "float": 1.0}
    with Ledger.open(run, CONFIG) as ledger:
        losses = [math.nan, None, math.inf, 5e-324]
        ledger.finish("two", trials=[replace(TRIAL, index=10 + i, final_loss=x) for i, x in enumerate(losses)])
        ledger.finish("three", policy=replace(POLICY, round=2, final_loss=math.nan), metrics=values)
        assert repr([trial.final_loss for trial in ledger.trials()[1:]]) == repr(losses)
        assert repr(ledger.policies()[1].final_loss) == "nan"
        [entry] = ledger.metrics("three")
        assert repr({name: entry[name] for name in values}) == repr(values)
        assert ledger.snapshot()["steps"]["three"]["nan"] == "NaN"
    assert lines(run)[1] == {"step": "three", **values, "nan": "NaN", "infinity": "-Infinity"}
    with closing(sqlite3.connect(run / DATABASE)) as connection:
        assert connection.execute("SELECT count(final_loss) FROM trials").fetchone() == (3,)


INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats().map(lambda x: x + 0.0)  # SQLite makes -0.0 0.0
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # half surrogates and NUL included


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_records_come_back(tmp_path, data):
    texts, integers = data.draw(st.lists(TEXTS, min_size=3, max_size=3)), data.draw(st.tuples(INTEGERS, INTEGERS))
    optional = data.draw(st.none() | TEXTS)
    edit = SelfEdit(*integers[:1], *texts[:2], 0, texts[2], data.draw(st.lists(INTEGERS).map(tuple)), None, 1, optional)
    trial = Trial(
        *integers[:1], *texts[:2], 3, 4, *integers, 0, data.draw(st.none() | FLOATS), optional,
        data.draw(st.lists(TEXTS).map(tuple)), data.draw(st.lists(st.none() | st.floats()).map(tuple)), 1e-300,
    )  # fmt: skip
    kept = data.draw(st.lists(st.tuples(TEXTS, INTEGERS)).map(tuple))
    policy = PolicyUpdate(*integers, optional, kept, 0, data.draw(st.none() | FLOATS), 0.1)
    names = TEXTS.filter(lambda name: name not in ("step", "finished"))
    metrics = data.draw(st.dictionaries(names, st.none() | TEXTS | INTEGERS | st.floats(), min_size=1, max_size=5))
    step = data.draw(TEXTS)
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    with Ledger.open(directory, {}) as ledger:
        ledger.finish(step, self_edits=[edit], trials=[trial], policy=policy, metrics=metrics)
        assert ledger.finished(step)
        contents = ledger.snapshot()
    with Ledger.open(directory, {}) as ledger:
        for found in (ledger.self_edits(edit.seed, edit.phase), ledger.trials(), ledger.policies()):
            assert repr(found) in (repr([edit]), repr([trial]), repr([policy]))
        [entry] = ledger.metrics(step)
        del entry["finished"]
        assert repr(entry) == repr({"step": step, **metrics})
        assert json.dumps(ledger.snapshot()) == json.dumps(contents)
        assert repr(json.loads((directory / METRICS).read_text())) == repr({**ledger.metrics()[0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-3}, r"config\.learning_rate: found 0.002; accepted: 0.001, with which"),
        ({"lora": {"r": 32, "targets": ["q_proj", "o"]}}, r'config\.lora\.targets\[1\]: found "o"; accepted: "v_proj"'),
        ({"seeds": []}, r"config\.seeds: found \[\]; accepted: nothing"),
        ({"new": None}, r"config\.new: found null; accepted: nothing"),
        ({"seeds": {1, 2}}, r"config: Object of type set is not JSON"),
    ],
)
def test_another_config(run, change, message):
    before = snapshot(run)
    with pytest.raises(InputError, match=message):
        Ledger.open(run, CONFIG | change)
    assert snapshot(run) == before
    assert_intact(run)


def test_equal_configs(tmp_path):
    Ledger.open(tmp_path / "run", {"a": (1, {"b": math.nan}), 2: True}).close()
    with Ledger.open(str(tmp_path / "run"), {"2": True, "a": [1, {"b": math.nan}]}) as ledger:
        assert ledger.config["a"][0] == 1


@pytest.mark.parametrize(
    ("again", "message"),
    [
        ({"step": "one"}, "step str 'one' is finished; accepted: each step once"),
        ({"trials": [replace(TRIAL, index=9), TRIAL]}, r"trials\.index.*found Trial\(seed=0, phase='round 1'"),
        ({"policy": replace(POLICY, seconds=None)}, r"NOT NULL constraint failed: policies\.seconds"),
        ({"self_edits": [replace(EDIT, index=9, sampling_seed=2**63)]}, "sampling_seed: found 9223372036854775808"),
        ({"trials": [replace(TRIAL, index=9, grades=(1j,))]}, "grades: found tuple .*complex"),
        ({"metrics": {"tensor": object()}}, "tensor: found <object"),
        ({"metrics": {"step": 1}}, "metrics: found 'step'"),
    ],
)
def test_rejected_steps(run, again, message):
    with Ledger.open(run, CONFIG) as ledger:
        before = ledger.snapshot()
        with pytest.raises(InputError, match=message):
            ledger.finish(
                again.pop("step", "two"), self_edits=again.pop("self_edits", [replace(EDIT, seed=5)]), **again
            )
        assert ledger.snapshot() == before
    assert_intact(run)


def test_one_process_at_a_time(run):
    ready, child_ready = os.pipe()

    def hold() -> None:
        with Ledger.open(run, CONFIG):
            os.write(child_ready, b".")
            time.sleep(60)

    pid = forked(hold)
    assert os.read(ready, 1) == b"."
    with pytest.raises(InputError, match=f"{run}: found that process {pid} holds this run; accepted: one process"):
        Ledger.open(run, CONFIG)
    with Ledger.read(run) as ledger:
        assert ledger.trials() == [TRIAL]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(child_ready)
    with Ledger.open(run, CONFIG), pytest.raises(InputError, match=f"process {os.getpid()} holds"):
        Ledger.open(run, CONFIG)
    assert_intact(run)


def test_reading_sees_one_moment(run):
    with Ledger.open(run, CONFIG) as ledger, Ledger.read(run) as reader:
        ledger.finish("two", trials=[replace(TRIAL, repeat=5)])
        assert reader.trials() == [TRIAL]
        assert not reader.finished("two")
        with Ledger.read(run) as later:
            assert len(later.trials()) == 2
        for change in (lambda: reader.finish("x"), lambda: reader.replace_directory(run / "x", lambda _: None)):
            with pytest.raises(InputError, match=r"opened for reading; accepted: Ledger\.open"):
                change()


@contextmanager
def without_rights():
    """Root may write anywhere, so here it is somebody else for a while."""
    if os.geteuid():
        yield
        return
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"root cannot become another user here: {error}")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(run):
    """What makes the run's directory read-only, at a path that others than its owner can reach."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)

        def make() -> Path:
            directory = shutil.copytree(run, Path(parent, "run"))
            for path in directory.iterdir():
                path.chmod(0o444)
            directory.chmod(0o555)
            return directory

        yield make
        Path(parent, "run").chmod(0o755)


@pytest.mark.parametrize("state", ["closed", "killed", "killed, without -shm"])
def test_read_only_directory(run, read_only, state):
    if state != "closed":

        def die() -> None:
            Ledger.open(run, CONFIG).finish("two", trials=[replace(TRIAL, repeat=5)])
            os.kill(os.getpid(), signal.SIGKILL)

        os.waitpid(forked(die), 0)
        assert (run / f"{DATABASE}-wal").stat().st_size
        if state.endswith("-shm"):
            (run / f"{DATABASE}-shm").unlink()
    directory = read_only()
    before = snapshot(directory)
    with without_rights():
        if os.access(directory, os.W_OK, effective_ids=True):
            pytest.skip("this user can write to read-only directories")
        with Ledger.read(directory) as ledger:
            assert len(ledger.trials()) == (1 if state == "closed" else 2)
        with pytest.raises(InputError, match=f"{directory}: found: .*denied.*; accepted: a directory that can be read"):
            Ledger.open(directory, CONFIG)
        with pytest.raises(InputError, match="denied"):
            Ledger.open(directory / "new", CONFIG)
    assert snapshot(directory) == before


def test_read_only_database(run, read_only):
    directory = read_only()
    directory.chmod(0o777)
    (directory / LOCK).chmod(0o666)
    with without_rights(), pytest.raises(InputError, match="readonly database; accepted: a directory that can be read"):
        Ledger.open(directory, CONFIG)


@contextmanager
def file_limit(limit: int):
    """No file can grow over so many bytes. Python ignores the signal, so that writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BIG = replace(EDIT, index=9, text="x" * 2**20)


def test_database_cannot_grow(run):
    with Ledger.open(run, CONFIG) as ledger:
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages + 5}")
        with pytest.raises(InputError, match=f"{run}: found: database or disk is full; accepted: room on the disk"):
            ledger.finish("two", self_edits=[BIG])
        assert not ledger.finished("two")
    assert_intact(run)


def test_files_cannot_grow(run):
    with Ledger.open(run, CONFIG) as ledger:
        directory = ledger.policy_directory(1, 1)
        with file_limit(2**18):
            with pytest.raises(InputError, match=r"disk.*; accepted: .*room on the disk"):
                ledger.finish("two", self_edits=[BIG])
            with pytest.raises(InputError, match=rf"{directory}: .*large.*; accepted: room on the disk"):
                ledger.replace_directory(directory, lambda path: (path / "a").write_bytes(bytes(2**19)))
            assert list(directory.parent.iterdir()) == []
        assert not ledger.finished("two")
        ledger.finish("two", self_edits=[BIG], metrics={"accuracy": 0.25})
        assert ledger.self_edits() == [EDIT, BIG]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_metrics_cannot_grow(tmp_path):
    """The step is finished all the same, and the file is brought in line later."""
    with Ledger.open(tmp_path / "run", CONFIG) as ledger:
        file = tmp_path / "run" / METRICS
        file.unlink()
        file.symlink_to("/dev/full")
        with pytest.raises(InputError, match=rf"{errno.ENOSPC}.*; accepted: room on the disk"):
            ledger.finish("one", metrics={"accuracy": 0.5})
        assert ledger.finished("one")
        file.unlink()
        ledger.finish("two", metrics={"accuracy": 1})
        assert [entry["step"] for entry in lines(tmp_path / "run")] == ["one", "two"]


@pytest.mark.parametrize("damage", ["missing", "half a line", "a line too many", "other"])
def test_metrics_are_repaired(run, damage):
    with Ledger.open(run, CONFIG) as ledger:
        ledger.finish("two", metrics={"accuracy": 1.0})
    file = run / METRICS
    text = file.read_bytes()
    broken = {"half a line": text[:-5], "a line too many": text + text, "other": b"\xff" * len(text)}
    file.write_bytes(broken.get(damage, b""))
    if damage == "missing":
        file.unlink()
    Ledger.open(run, CONFIG).close()
    assert file.read_bytes() == text


def test_other_directories(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(
        InputError, match=f"{other}: found str 'notes.txt' and no {DATABASE}; accepted: a new directory"
    ):
        Ledger.open(other, CONFIG)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=f"{other / 'notes.txt'}: found: .*exists"):
        Ledger.open(other / "notes.txt", CONFIG)
    with pytest.raises(InputError, match=f"{other / DATABASE}: missing; accepted: the directory of a run"):
        Ledger.read(other)
    with closing(sqlite3.connect(run / DATABASE)) as connection:
        connection.execute("PRAGMA application_id = 0")
    for opened in (Ledger.read, lambda directory: Ledger.open(directory, CONFIG)):
        with pytest.raises(InputError, match=f"{run / DATABASE}: found no ledger in it"):
            opened(run)


def test_newer_schema(run):
    with closing(sqlite3.connect(run / DATABASE, isolation_level=None)) as connection:
        connection.execute("UPDATE run SET schema_version = schema_version + 1")
    before = snapshot(run)
    for opened in (lambda: Ledger.read(run), lambda: Ledger.open(run, CONFIG)):
        with pytest.raises(InputError, match=r"schema_version: found 4; accepted: 1 to 3, or a newer seal_engine"):
            opened()
    assert before[DATABASE] == snapshot(run)[DATABASE]
    with closing(sqlite3.connect(run / DATABASE, isolation_level=None)) as connection:
        connection.execute("UPDATE run SET schema_version = schema_version - 1")
    assert_intact(run)


@pytest.mark.parametrize("damage", ["no database", "cut short", "page", "text", "list"])
def test_damaged_database(run, damage):
    file = run / DATABASE
    whole = file.read_bytes()
    broken = {
        "no database": b"hello" * 4096,
        "cut short": whole[: len(whole) // 2],
        "page": whole[:-8192] + bytes(4096) + whole[-4096:],
        "text": whole.replace("Käse".encode(), b"K\xff\xffse"),
        "list": whole.replace(b"[5,3,8]", b"[5,3,8x"),
    }
    file.write_bytes(broken[damage])
    for opened in (lambda: Ledger.read(run), lambda: Ledger.open(run, CONFIG)):
        with pytest.raises(InputError, match=rf"{run}.*; accepted: a ledger that is whole"), opened() as ledger:
            ledger.self_edits()
    header = 100  # bytes, in which SQLite counts who has opened it to write
    assert file.read_bytes()[header:] == broken[damage][header:]
    for leftover in run.glob("*-*"):
        leftover.unlink()
    file.write_bytes(whole)
    assert_intact(run)


def test_written_to_by_hand(run):
    """Someone's open transaction is waited for; after that it is an error, and nothing is lost."""
    other = sqlite3.connect(run / DATABASE, isolation_level=None, check_same_thread=False)
    with closing(other), Ledger.open(run, CONFIG) as ledger:
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.1, lambda: other.execute("ROLLBACK"))
        timer.start()
        ledger.finish("two")
        timer.join()
        other.execute("BEGIN IMMEDIATE")
        ledger._connection.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(InputError, match="database is locked; accepted: that no other program writes"):
            ledger.finish("three")
        other.execute("ROLLBACK")
        assert not ledger.finished("three")
    assert_intact(run)


def test_replace_directory(run):
    with Ledger.open(run, CONFIG) as ledger:
        final = ledger.policy_directory(3, 1)
        ledger.replace_directory(final, lambda path: (path / "old").write_text("old"))
        ledger.replace_directory(final, lambda path: (path / "new").write_text("new"))
        assert [path.name for path in final.iterdir()] == ["new"]
        with pytest.raises(ZeroDivisionError):
            ledger.replace_directory(run / "x", lambda path: 1 // 0)
        with pytest.raises(InputError, match="belongs to a policy that is recorded"):
            ledger.replace_directory(ledger.policy_directory(0, 1), lambda path: None)
        with pytest.raises(InputError, match=r"final: found .*; accepted: a path below"):
            ledger.replace_directory(run.parent / "x", lambda path: None)
    (run / "policies" / ".partial.abc" / ".partial.def").mkdir(parents=True)
    (run / ".partial.metrics.jsonl").write_text("half")
    Ledger.open(run, CONFIG).close()
    assert sorted(path.name for path in run.iterdir()) == [LOCK, DATABASE, METRICS, "policies"]
    assert list((run / "policies").iterdir()) == [final]
