"""What a run has done so far, in one directory that survives `kill -9` and power loss.

ledger.sqlite   what counts: one transaction for each finished step; -wal and -shm beside it while the run goes on
metrics.jsonl   the steps' metrics once more, a line each, for other tools; follows the database
ledger.lock     names the process that holds the run; the kernel releases it when that process dies
policies/       adapters of policies, each complete or not there
"""

import json
import math
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypeVar

from seal_engine.files import PARTIAL, complete_directory, complete_file, flush, show
from seal_engine.loop import database as db
from seal_engine.loop.database import from_column, is_nan, to_column, transaction, translate_errors
from seal_engine.loop.records import PolicyUpdate, SelfEdit, Trial
from seal_engine.types import InputError, require

DATABASE, LOCK, METRICS, POLICIES = "ledger.sqlite", "ledger.lock", "metrics.jsonl", "policies"
RESERVED = ("step", "finished")  # in metrics.jsonl


Record = TypeVar("Record", SelfEdit, Trial, PolicyUpdate)
_TABLES = {  # and what tells records apart, which is also their order
    SelfEdit: ("self_edits", ("seed", "phase", "context", "index")),
    Trial: ("trials", ("seed", "phase", "context", "index", "repeat")),
    PolicyUpdate: ("policies", ("seed", "round")),
}
JSON_COLUMNS = {
    **dict.fromkeys(("token_ids", "answers", "grades", "losses"), tuple),
    "kept": lambda pairs: tuple(map(tuple, pairs)),
}


class Ledger:
    """A run directory. `open` it to go on with the run, as one process at a time can; `read` it at any time."""

    def __init__(self, directory: Path, connection: sqlite3.Connection, writable: bool):
        """Used by open and read."""
        self.directory = directory
        self.config: dict[str, Any] = json.loads(connection.execute("SELECT config FROM run").fetchone()[0])
        self._connection, self._writable = connection, writable
        self._resources = ExitStack()  # closed with the ledger
        self._since = time.monotonic(), time.process_time()
        self._metrics_bytes = 0  # length of metrics.jsonl

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any],
        mutable: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        growing: Sequence[str] = (),
    ) -> Self:
        """Begin a run, or go on with it: what a crash left half-done is removed.

        InputError if the directory holds something else, cannot be written, is held by another process, is damaged,
        is of a newer version, or began with another config (compared as JSON, but for the keys in `mutable`, and for
        numbers under the keys in `growing` that are larger now); it is then left as it was. A run of an earlier version
        is brought up to date: a key that it lacks has the value in `defaults`, also within an object. The config is
        recorded as it is now.
        """
        path = Path(os.path.realpath(directory))
        wanted = _as_json(config)
        with ExitStack() as stack, translate_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            others = sorted(name for name in os.listdir(path) if not name.startswith("ledger."))
            if others and not (path / DATABASE).exists():
                raise InputError(f"{path}: found {show(others[0])} and no {DATABASE}; accepted: a new directory")
            db.lock(path / LOCK, stack)
            connection = db.connect(path / DATABASE, "rwc", stack)
            if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():  # new, or killed before it had begun
                db.create(connection, wanted)
            db.validate_database(connection, path / DATABASE)
            db.migrate(connection)
            ledger = cls(path, connection, writable=True)
            _validate_config(ledger, wanted, mutable, _as_json(defaults or {}), growing)
            connection.execute(
                "UPDATE run SET config = ?", [json.dumps(wanted)]
            )  # which also shows that it is writable
            db.hold_side_files(connection, stack)
            ledger.config = wanted
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
        with ExitStack() as stack, translate_errors(path):
            try:
                connection = db.connect(file, "ro", stack)
                connection.execute("BEGIN")  # all that is read is of one moment, which the next line fixes
                connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            except sqlite3.OperationalError as error:
                if db.result_code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                    raise
                # SQLite wants files beside the database, which a read-only directory may lack.
                connection = db.connect(_copy(file, stack), "rw", stack)
            db.validate_database(connection, file)
            if db.schema_version(connection) != db.SCHEMA_VERSION:
                connection = db.connect(_copy(file, stack), "rw", stack)
                db.migrate(connection)
            ledger = cls(path, connection, writable=False)
            ledger._resources = stack.pop_all()
            return ledger

    def finished(self, step: str) -> bool:
        """Whether the step has been finished."""
        with translate_errors(self.directory):
            found = self._connection.execute("SELECT 1 FROM steps WHERE step = ?", [to_column("step", step)])
            return found.fetchone() is not None

    def finish(
        self,
        step: str,
        *,
        self_edits: Sequence[SelfEdit] = (),
        trials: Sequence[Trial] = (),
        policy: PolicyUpdate | None = None,
        metrics: Mapping[str, float | int | str | None] | None = None,
    ) -> None:
        """Record a step and all that belongs to it, at once: when this returns, it is on the disk.

        InputError, and nothing recorded, if the step or one of the records is there already, a value cannot be
        stored, or the disk is full. If only metrics.jsonl cannot be written the step is finished; open repairs it.
        """
        self._require_writable()
        began, cpu_began = self._since
        times = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu_began}
        key = to_column("step", step)
        with translate_errors(self.directory):
            with transaction(self._connection):
                if self.finished(step):
                    raise InputError(f"{self.directory}: step {show(step)} is finished; accepted: each step once")
                self._insert("steps", {"step": key, "finished": db.now()} | times, step)
                for name, value in (metrics or {}).items():
                    require(name not in RESERVED, "metrics", name, f"other names than {' and '.join(RESERVED)}")
                    row = {"step": key, "name": to_column("metrics", name), "value": to_column(name, value)}
                    self._insert("metrics", row | {"is_nan": int(is_nan(value))}, name)
                for record in (*self_edits, *trials, *([policy] if policy else [])):
                    row = {"step": key} | {name: to_column(name, value) for name, value in vars(record).items()}
                    if is_nan(vars(record).get("final_loss")):
                        row["final_loss_is_nan"] = 1
                    self._insert(_TABLES[type(record)][0], row, record)
            self._since = time.monotonic(), time.process_time()
            if metrics:
                self._append_metrics(step)

    def self_edits(self, seed: int | None = None, phase: str | None = None) -> list[SelfEdit]:
        """Self-edits, all or those of a seed or phase, ordered by seed, phase, context and index."""
        return self._records(SelfEdit, seed=seed, phase=phase)

    def trials(self, seed: int | None = None, phase: str | None = None) -> list[Trial]:
        """Trials, all or those of a seed or phase, ordered by seed, phase, context, index and repeat."""
        return self._records(Trial, seed=seed, phase=phase)

    def policies(self, seed: int | None = None) -> list[PolicyUpdate]:
        """Policies, all or those of a seed, ordered by seed and round."""
        return self._records(PolicyUpdate, seed=seed)

    def metrics(self, step: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: "step", "finished" (UTC, ISO 8601) and the metrics of each step that has any.

        In the order in which steps were finished. step: of that one alone.
        """
        query = "SELECT step, finished, name, value, is_nan FROM steps JOIN metrics USING (step)"
        query += "" if step is None else " WHERE step = ?"
        values = [] if step is None else [to_column("step", step)]
        entries: dict[str, dict[str, Any]] = {}
        with translate_errors(self.directory):
            for row in self._connection.execute(f"{query} ORDER BY steps.number, metrics.number", values):
                name, finished, metric, value = map(from_column, tuple(row)[:4])
                entry = entries.setdefault(name, {"step": name, "finished": finished})
                entry[metric] = math.nan if row["is_nan"] else value
        return list(entries.values())

    @property
    def started(self) -> str:
        """When the run began (UTC, ISO 8601)."""
        return self._connection.execute("SELECT started FROM run").fetchone()[0]

    def steps(self) -> list[tuple[str, str, float, float | None]]:
        """(name, when it was finished, seconds that it took, CPU seconds of this process) of every step, in the order
        they were finished. None: recorded before CPU time was."""
        with translate_errors(self.directory):
            rows = self._connection.execute("SELECT step, finished, seconds, cpu_seconds FROM steps ORDER BY number")
            return [(from_column(step), *times) for step, *times in rows]

    def snapshot(self) -> dict[str, Any]:
        """All but times, as JSON: what two equal runs have in common. NaN and infinity are named by strings.

        Times are the fields "seconds", and metrics whose names end in "seconds" or "per_second".
        """
        with translate_errors(self.directory):
            steps = {from_column(row["step"]): {} for row in self._connection.execute("SELECT step FROM steps")}
        for entry in self.metrics():
            times = [name for name in entry if name.endswith(("seconds", "per_second"))]
            steps[entry["step"]] = {name: entry[name] for name in entry if name not in (*RESERVED, *times)}
        snapshot: dict[str, Any] = {"config": self.config, "steps": steps}
        for kind, (table, _) in _TABLES.items():
            records = [asdict(record) for record in self._records(kind)]
            snapshot[table] = [{name: r[name] for name in r if name != "seconds"} for r in records]
        return json.loads(json.dumps(snapshot, sort_keys=True), parse_constant=str)

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
        with translate_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                discarded = tempfile.mkdtemp(prefix=PARTIAL, dir=final.parent)
                final.replace(discarded)  # at once, so that `final` is never half-removed
                shutil.rmtree(discarded)
            with complete_directory(final) as partial:
                write(partial)
                for root, _, files in os.walk(partial):
                    for path in (*files, "."):
                        flush(Path(root, path))
            for parent in (final.parent, self.directory):
                flush(parent)

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
        wanted = {name: to_column(name, value) for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in wanted) or "1"
        order = ", ".join(f'"{name}"' for name in key)
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY {order}"
        found = []
        with translate_errors(self.directory):
            for row in map(dict, self._connection.execute(query, list(wanted.values()))):
                if row.pop("final_loss_is_nan", 0):
                    row["final_loss"] = math.nan
                del row["step"]
                fields = {name: from_column(value) for name, value in row.items()}
                lists = {
                    name: JSON_COLUMNS[name](json.loads(fields[name])) for name in JSON_COLUMNS.keys() & fields.keys()
                }
                found.append(kind(**fields | lists))
        return found

    def _append_metrics(self, step: str) -> None:
        [entry] = self.metrics(step)
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
            with complete_file(file) as partial:
                partial.write_bytes(text)
        self._metrics_bytes = len(text)


def _copy(file: Path, stack: ExitStack) -> Path:
    """A copy of the database, for as long as the stack is open."""
    copies = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for copied in (file, file.with_name(f"{DATABASE}-wal"), file.with_name(f"{DATABASE}-journal")):
        if copied.exists():
            shutil.copyfile(copied, copies / copied.name)
    return copies / DATABASE


def _validate_config(
    ledger: Ledger, wanted: dict[str, Any], mutable: Sequence[str], defaults: Mapping[str, Any], growing: Sequence[str]
) -> None:
    """InputError naming the first field that differs."""
    recorded = {**defaults, **ledger.config}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(recorded[name], dict):
            recorded[name] = value | recorded[name]
    for name in growing:
        if name in recorded and name in wanted and wanted[name] < recorded[name]:
            accepted = f"{recorded[name]}, with which the run began, or more"
            raise InputError(f"{ledger.directory}: config.{name}: found {wanted[name]}; accepted: {accepted}")
    mutable = (*mutable, *growing)
    kept = [{k: v for k, v in config.items() if k not in mutable} for config in (recorded, wanted)]
    began, current = [_flatten(config, "config") for config in kept]
    for name in current | began:
        old, new = began.get(name, "nothing"), current.get(name, "nothing")
        if old != new:
            accepted = f"{old:.200}, with which the run began, or a new directory"
            raise InputError(f"{ledger.directory}: {name}: found {new:.200}; accepted: {accepted}")


def _flatten(value: Any, name: str) -> dict[str, str]:
    """Name -> JSON text of each value that holds no others."""
    if isinstance(value, dict) and value:
        parts = [_flatten(item, f"{name}.{key}") for key, item in value.items()]
    elif isinstance(value, list) and value:
        parts = [_flatten(item, f"{name}[{i}]") for i, item in enumerate(value)]
    else:
        return {name: json.dumps(value)}
    return {key: text for part in parts for key, text in part.items()}


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it comes back from a file: tuples are lists, keys are strings."""
    try:
        return json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"config: {error}; accepted: what JSON can hold") from None


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
