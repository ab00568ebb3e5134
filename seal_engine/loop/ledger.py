"""What a run has done so far, in one directory that survives `kill -9` and power loss.

ledger.sqlite   what counts: one transaction for each finished unit of work
metrics.jsonl   the units' metrics once more, a line each, for other tools; follows the database
ledger.lock     names the process that holds the run; the kernel releases it when that process dies
policies/       adapters of policies, each complete or not there
"""

import errno
import fcntl
import json
import math
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from seal_engine.files import PARTIAL, complete_directory, show
from seal_engine.types import InputError, require

DATABASE, LOCK, METRICS, POLICIES = "ledger.sqlite", "ledger.lock", "metrics.jsonl", "policies"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x5EA1  # in the database's header: it is ours
RESERVED = ("unit", "finished")  # in metrics.jsonl
BUSY_SECONDS = 60.0  # how long to wait for someone who writes to the database by hand
SCHEMA = """
CREATE TABLE run (schema_version INTEGER NOT NULL, started TEXT NOT NULL, config TEXT NOT NULL);
CREATE TABLE units (
    number INTEGER PRIMARY KEY, unit TEXT NOT NULL UNIQUE, finished TEXT NOT NULL, seconds REAL NOT NULL
);
CREATE TABLE metrics (
    number INTEGER PRIMARY KEY, unit TEXT NOT NULL REFERENCES units (unit), name TEXT NOT NULL,
    value, is_nan INTEGER NOT NULL DEFAULT 0, UNIQUE (unit, name)
);
CREATE TABLE self_edits (
    unit TEXT NOT NULL REFERENCES units (unit),
    seed INTEGER NOT NULL, phase TEXT NOT NULL, context TEXT NOT NULL, "index" INTEGER NOT NULL,
    text TEXT NOT NULL, token_ids TEXT NOT NULL, sampling_seed INTEGER, attempts INTEGER NOT NULL, refused TEXT,
    PRIMARY KEY (seed, phase, context, "index")
);
CREATE TABLE trials (
    unit TEXT NOT NULL REFERENCES units (unit),
    seed INTEGER NOT NULL, phase TEXT NOT NULL, context TEXT NOT NULL, "index" INTEGER NOT NULL,
    repeat INTEGER NOT NULL, train_seed INTEGER NOT NULL, num_steps INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    final_loss REAL, final_loss_is_nan INTEGER NOT NULL DEFAULT 0, error TEXT,
    answers TEXT NOT NULL, grades TEXT NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (seed, phase, context, "index", repeat)
);
CREATE TABLE policies (
    unit TEXT NOT NULL REFERENCES units (unit),
    seed INTEGER NOT NULL, round INTEGER NOT NULL, path TEXT, kept TEXT NOT NULL, num_steps INTEGER NOT NULL,
    final_loss REAL, final_loss_is_nan INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL,
    PRIMARY KEY (seed, round)
);
CREATE INDEX self_edits_unit ON self_edits (unit);
CREATE INDEX trials_unit ON trials (unit);
CREATE INDEX policies_unit ON policies (unit);
"""


@dataclass(frozen=True)
class SelfEdit:
    """What the policy wrote for a context."""

    seed: int
    phase: str  # "round 1", "evaluation 0"
    context: str
    index: int  # which of the k
    text: str
    token_ids: tuple[int, ...]
    sampling_seed: int | None
    attempts: int  # samples drawn until one was accepted
    refused: str | None  # why it cannot be trained


@dataclass(frozen=True)
class Trial:
    """One adapter trained and asked, or the base asked without one."""

    seed: int
    phase: str
    context: str
    index: int
    repeat: int
    train_seed: int
    num_steps: int
    num_tokens: int
    final_loss: float | None
    error: str | None
    answers: tuple[str, ...]
    grades: tuple[float | None, ...]  # one a question; None: it could not be had
    seconds: float  # wall time, shared evenly among the trials of a unit

    @property
    def accuracy(self) -> float | None:
        """Mean of the grades that could be had, None if none could; 0 for a trial that failed."""
        if self.error is not None:
            return 0.0
        grades = [grade for grade in self.grades if grade is not None]
        return sum(grades) / len(grades) if grades else None


@dataclass(frozen=True)
class Policy:
    """What a round's M-step made."""

    seed: int
    round: int
    path: str | None  # directory of the adapter, relative to the run directory
    kept: tuple[tuple[str, int], ...]  # (context, index) of the self-edits it was trained on
    num_steps: int
    final_loss: float | None
    seconds: float


Record = TypeVar("Record", SelfEdit, Trial, Policy)
_TABLES = {  # and what tells records apart, which is also their order
    SelfEdit: ("self_edits", ("seed", "phase", "context", "index")),
    Trial: ("trials", ("seed", "phase", "context", "index", "repeat")),
    Policy: ("policies", ("seed", "round")),
}
_LISTS = {"token_ids": tuple, "answers": tuple, "grades": tuple, "kept": lambda pairs: tuple(map(tuple, pairs))}


class Ledger:
    """A run directory. `open` it to go on with the run, as one process at a time can; `read` it at any time."""

    def __init__(self, directory: Path, connection: sqlite3.Connection, writable: bool):
        """Used by open and read."""
        self.directory = directory
        self.config: dict[str, Any] = json.loads(connection.execute("SELECT config FROM run").fetchone()[0])
        self._connection, self._writable = connection, writable
        self._resources = ExitStack()  # closed with the ledger
        self._since = time.monotonic()
        self._metrics_bytes = 0  # length of metrics.jsonl

    @classmethod
    def open(cls, directory: str | os.PathLike[str], config: Mapping[str, Any], free: Sequence[str] = ()) -> Self:
        """Begin a run, or go on with it: what a crash left half-done is removed.

        InputError if the directory holds something else, cannot be written, is held by another process, is damaged,
        is of a newer version, or began with another config (compared as JSON, but for what `free` names); it is then
        left as it was.
        """
        path = Path(os.path.realpath(directory))
        wanted = _as_json(config)
        with ExitStack() as stack, _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            others = sorted(name for name in os.listdir(path) if not name.startswith("ledger."))
            if others and not (path / DATABASE).exists():
                raise InputError(f"{path}: found {show(others[0])} and no {DATABASE}; accepted: a new directory")
            _lock(path / LOCK, stack)
            connection = _connect(path / DATABASE, "rwc", stack)
            if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():  # new, or killed before it had begun
                connection.execute("PRAGMA journal_mode = WAL")  # readers and the run never wait for each other
                with _transaction(connection):
                    for statement in SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    row = SCHEMA_VERSION, _now(), json.dumps(wanted)
                    connection.execute("INSERT INTO run VALUES (?, ?, ?)", row)
            _check(connection, path / DATABASE)
            ledger = cls(path, connection, writable=True)
            _check_config(ledger, wanted, free)
            connection.execute("UPDATE run SET schema_version = schema_version")  # better refused now than hours later
            for leftover in list(path.rglob(f"{PARTIAL}*")):
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover, ignore_errors=True)  # one may lie in another that is gone already
                else:
                    leftover.unlink(missing_ok=True)
            ledger._write_metrics()
            ledger._resources = stack.pop_all()
            return ledger

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Self:
        """The run as it is now, whether or not a process holds it. InputError if there is none, or it is damaged."""
        path = Path(os.path.realpath(directory))
        file = path / DATABASE
        if not file.is_file():
            raise InputError(f"{file}: missing; accepted: the directory of a run")
        with ExitStack() as stack, _explained(path):
            try:
                connection = _connect(file, "ro", stack)
                connection.execute("BEGIN")  # all that is read is of one moment, which the next line fixes
                connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            except sqlite3.OperationalError as error:
                if _code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                    raise
                # SQLite wants files beside the database, which a read-only directory may lack.
                copies = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                for copied in (file, file.with_name(f"{DATABASE}-wal")):
                    if copied.exists():
                        shutil.copyfile(copied, copies / copied.name)
                connection = _connect(copies / DATABASE, "ro", stack)
            _check(connection, file)
            ledger = cls(path, connection, writable=False)
            ledger._resources = stack.pop_all()
            return ledger

    def finished(self, unit: str) -> bool:
        """Whether the unit has been finished."""
        with _explained(self.directory):
            found = self._connection.execute("SELECT 1 FROM units WHERE unit = ?", [_stored("unit", unit)])
            return found.fetchone() is not None

    def finish(
        self,
        unit: str,
        *,
        self_edits: Sequence[SelfEdit] = (),
        trials: Sequence[Trial] = (),
        policy: Policy | None = None,
        metrics: Mapping[str, float | int | str | None] | None = None,
    ) -> None:
        """Record a unit and all that belongs to it, at once: when this returns, it is on the disk.

        InputError, and nothing recorded, if the unit or one of the records is there already, a value cannot be
        stored, or the disk is full. If only metrics.jsonl cannot be written the unit is finished; open repairs it.
        """
        self._require_writable()
        seconds = time.monotonic() - self._since
        key = _stored("unit", unit)
        with _explained(self.directory):
            with _transaction(self._connection):
                if self.finished(unit):
                    raise InputError(f"{self.directory}: unit {show(unit)} is finished; accepted: each unit once")
                self._insert("units", {"unit": key, "finished": _now(), "seconds": seconds}, unit)
                for name, value in (metrics or {}).items():
                    require(name not in RESERVED, "metrics", name, f"other names than {' and '.join(RESERVED)}")
                    row = {"unit": key, "name": _stored("metrics", name), "value": _stored(name, value)}
                    self._insert("metrics", row | {"is_nan": int(_is_nan(value))}, name)
                for record in (*self_edits, *trials, *([policy] if policy else [])):
                    row = {"unit": key} | {name: _stored(name, value) for name, value in vars(record).items()}
                    if _is_nan(vars(record).get("final_loss")):
                        row["final_loss_is_nan"] = 1
                    self._insert(_TABLES[type(record)][0], row, record)
            self._since = time.monotonic()
            if metrics:
                self._append_metrics(unit)

    def self_edits(self, seed: int | None = None, phase: str | None = None) -> list[SelfEdit]:
        """Self-edits, all or those of a seed or phase, ordered by seed, phase, context and index."""
        return self._records(SelfEdit, seed=seed, phase=phase)

    def trials(self, seed: int | None = None, phase: str | None = None) -> list[Trial]:
        """Trials, all or those of a seed or phase, ordered by seed, phase, context, index and repeat."""
        return self._records(Trial, seed=seed, phase=phase)

    def policies(self, seed: int | None = None) -> list[Policy]:
        """Policies, all or those of a seed, ordered by seed and round."""
        return self._records(Policy, seed=seed)

    def metrics(self, unit: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: "unit", "finished" (UTC, ISO 8601) and the metrics of each unit that has any.

        In the order in which units were finished. unit: of that one alone.
        """
        query = "SELECT unit, finished, name, value, is_nan FROM units JOIN metrics USING (unit)"
        query += "" if unit is None else " WHERE unit = ?"
        values = [] if unit is None else [_stored("unit", unit)]
        entries: dict[str, dict[str, Any]] = {}
        with _explained(self.directory):
            for row in self._connection.execute(f"{query} ORDER BY units.number, metrics.number", values):
                name, finished, metric, value = map(_restored, tuple(row)[:4])
                entry = entries.setdefault(name, {"unit": name, "finished": finished})
                entry[metric] = math.nan if row["is_nan"] else value
        return list(entries.values())

    @property
    def started(self) -> str:
        """When the run began (UTC, ISO 8601)."""
        return self._connection.execute("SELECT started FROM run").fetchone()[0]

    def units(self) -> list[tuple[str, str, float]]:
        """(name, when it was finished, seconds that it took) of every unit, in the order they were finished."""
        with _explained(self.directory):
            rows = self._connection.execute("SELECT unit, finished, seconds FROM units ORDER BY number")
            return [(_restored(unit), finished, seconds) for unit, finished, seconds in rows]

    def contents(self) -> dict[str, Any]:
        """All but times, as JSON: what two equal runs have in common. NaN and infinity are named by strings.

        Times are the fields "seconds", and metrics whose names end in "seconds" or "per_second".
        """
        with _explained(self.directory):
            units = {_restored(row["unit"]): {} for row in self._connection.execute("SELECT unit FROM units")}
        for entry in self.metrics():
            times = [name for name in entry if name.endswith(("seconds", "per_second"))]
            units[entry["unit"]] = {name: entry[name] for name in entry if name not in (*RESERVED, *times)}
        contents: dict[str, Any] = {"config": self.config, "units": units}
        for kind, (table, _) in _TABLES.items():
            records = [asdict(record) for record in self._records(kind)]
            contents[table] = [{name: r[name] for name in r if name != "seconds"} for r in records]
        return json.loads(json.dumps(contents, sort_keys=True), parse_constant=str)

    def policy_directory(self, seed: int, round: int) -> Path:
        """Where the adapter of a policy belongs."""
        return self.directory / POLICIES / f"seed-{seed}-round-{round}"

    def replace_directory(self, final: Path, write: Callable[[Path], object]) -> None:
        """Give `write` an empty directory, which becomes `final` with all it holds safely on the disk, or vanishes.

        What an unfinished attempt left there is replaced. InputError if `final` is outside the run directory, is that
        of a recorded policy, or the disk is full.
        """
        self._require_writable()
        require(self.directory in final.parents, "final", str(final), f"a path below {self.directory}")
        if str(final.relative_to(self.directory)) in {policy.path for policy in self.policies()}:
            raise InputError(f"{final}: belongs to a policy that is recorded; accepted: another directory")
        with _explained(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                discarded = tempfile.mkdtemp(prefix=PARTIAL, dir=final.parent)
                final.replace(discarded)  # at once, so that `final` is never half-removed
                shutil.rmtree(discarded)
            with complete_directory(final) as partial:
                write(partial)
                for root, _, files in os.walk(partial):
                    for path in (*files, "."):
                        _flush(Path(root, path))
            for parent in (final.parent, self.directory):
                _flush(parent)

    def close(self) -> None:
        """Let go of the run. Closing twice does nothing."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_writable(self) -> None:
        if not self._writable:
            raise InputError(f"{self.directory}: opened for reading; accepted: Ledger.open")

    def _insert(self, table: str, row: Mapping[str, Any], what: Any) -> None:
        names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        try:
            self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))
        except sqlite3.IntegrityError as error:  # there already, or None where it is not allowed
            raise InputError(f"{self.directory}: {error}: found {what!r:.200}; accepted: each record once") from None

    def _records(self, kind: type[Record], **wanted: Any) -> list[Record]:
        table, key = _TABLES[kind]
        wanted = {name: _stored(name, value) for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in wanted) or "1"
        order = ", ".join(f'"{name}"' for name in key)
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY {order}"
        found = []
        with _explained(self.directory):
            for row in map(dict, self._connection.execute(query, list(wanted.values()))):
                if row.pop("final_loss_is_nan", 0):
                    row["final_loss"] = math.nan
                del row["unit"]
                fields = {name: _restored(value) for name, value in row.items()}
                lists = {name: _LISTS[name](json.loads(fields[name])) for name in _LISTS.keys() & fields.keys()}
                found.append(kind(**fields | lists))
        return found

    def _append_metrics(self, unit: str) -> None:
        [entry] = self.metrics(unit)
        line = _line(entry)
        expected, self._metrics_bytes = self._metrics_bytes, -1  # until we know that it is written
        with (self.directory / METRICS).open("ab") as stream:
            if stream.tell() == expected:
                stream.write(line)
                stream.flush()
                self._metrics_bytes = expected + len(line)
        if self._metrics_bytes < 0:  # someone has changed the file, or a write before has failed
            self._write_metrics()

    def _write_metrics(self) -> None:
        """Make metrics.jsonl what the database says. It is derived, so it needs no fsync on every line."""
        text = b"".join(map(_line, self.metrics()))
        file = self.directory / METRICS
        if not (file.exists() and file.read_bytes() == text):
            partial = self.directory / f"{PARTIAL}{METRICS}"
            partial.write_bytes(text)
            _flush(partial)
            partial.replace(file)
        self._metrics_bytes = len(text)


def _connect(file: Path, mode: str, stack: ExitStack) -> sqlite3.Connection:
    # isolation_level None: without Python's own transactions, for each is begun and ended here.
    connection = sqlite3.connect(f"{file.as_uri()}?mode={mode}", timeout=BUSY_SECONDS, isolation_level=None, uri=True)
    stack.callback(connection.close)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # with WAL, NORMAL would lose the last units to a power cut
    return connection


def _check(connection: sqlite3.Connection, file: Path) -> None:
    """InputError if it is no ledger, is of another version, or is damaged."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise InputError(f"{file}: found no ledger in it; accepted: a new directory, or one in which a run has begun")
    version = connection.execute("SELECT schema_version FROM run").fetchone()[0]
    if version != SCHEMA_VERSION:
        accepted = f"{SCHEMA_VERSION}, or a newer seal_engine"
        raise InputError(f"{file}: schema_version: found {version}; accepted: {accepted}")
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise InputError(f"{file}: damaged: {' '.join(damage.split())}; accepted: {_ADVICE[sqlite3.SQLITE_CORRUPT]}")


def _check_config(ledger: Ledger, wanted: dict[str, Any], free: Sequence[str]) -> None:
    """InputError naming the first field that differs."""
    kept = ({k: v for k, v in config.items() if k not in free} for config in (ledger.config, wanted))
    began, now = (_leaves(config, "config") for config in kept)
    for name in now | began:
        old, new = began.get(name, "nothing"), now.get(name, "nothing")
        if old != new:
            accepted = f"{old:.200}, with which the run began, or a new directory"
            raise InputError(f"{ledger.directory}: {name}: found {new:.200}; accepted: {accepted}")


def _leaves(value: Any, name: str) -> dict[str, str]:
    """Name -> JSON text of each value that holds no others."""
    if isinstance(value, dict) and value:
        parts = [_leaves(item, f"{name}.{key}") for key, item in value.items()]
    elif isinstance(value, list) and value:
        parts = [_leaves(item, f"{name}[{i}]") for i, item in enumerate(value)]
    else:
        return {name: json.dumps(value)}
    return {key: text for part in parts for key, text in part.items()}


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it comes back from a file: tuples are lists, keys are strings."""
    try:
        return json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"config: {error}; accepted: what JSON can hold") from None


def _lock(file: Path, stack: ExitStack) -> None:
    """Hold the run until the stack is closed or this process dies. InputError if another process does."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace") or "unknown"
        accepted = "one process at a time (wait until it ends, or stop it)"
        raise InputError(f"{file.parent}: found that process {holder} holds this run; accepted: {accepted}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:  # after a full disk SQLite may have rolled back by itself
            connection.execute("ROLLBACK")


_ROOM = "room on the disk (then run the same command again: it goes on from what is finished)"
_WRITABLE = "a directory that can be read and written"
_ADVICE = {
    sqlite3.SQLITE_FULL: _ROOM,
    sqlite3.SQLITE_IOERR: f"a disk that works and has {_ROOM}",
    sqlite3.SQLITE_READONLY: _WRITABLE,
    sqlite3.SQLITE_CANTOPEN: _WRITABLE,
    sqlite3.SQLITE_BUSY: "that no other program writes to the ledger (close it, and run the same command again)",
    sqlite3.SQLITE_CORRUPT: "a ledger that is whole (put a copy of the directory in its place, or use a new one)",
}
_ADVICE[sqlite3.SQLITE_NOTADB] = _ADVICE[sqlite3.SQLITE_CORRUPT]


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; text that is not UTF-8, which Python finds by itself, counts as damage."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """InputError for what the disk refuses or a file should not hold: the path, what was found and what to do."""
    try:
        yield
    except sqlite3.ProgrammingError:  # such as a closed ledger: no fault of the disk
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: found: {error}; accepted: {_ADVICE[sqlite3.SQLITE_CORRUPT]}") from error
    except sqlite3.DatabaseError as error:
        accepted = _ADVICE.get(_code(error), "a ledger that seal_engine alone has written")
        raise InputError(f"{path}: found: {error}; accepted: {accepted}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise InputError(f"{path}: found: {error}; accepted: {_ROOM if full else _WRITABLE}") from error


def _stored(name: str, value: Any) -> Any:
    """A value as SQLite can hold it: lists as JSON text, NaN as NULL, half surrogates, which are not text, as bytes."""
    if isinstance(value, tuple | list):
        try:
            return json.dumps(value, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: found {show(value)}: {error}; accepted: text and numbers") from None
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        return encoded if encoded.decode("utf-8", "replace") != value else value
    plain = value is None or isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)
    require(plain, name, value, "text, a number (an integer of at most 64 bits) or None")
    return None if _is_nan(value) else value


def _restored(value: Any) -> Any:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
