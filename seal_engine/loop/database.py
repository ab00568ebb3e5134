"""The ledger's database: its schema, connections, durability, and what SQLite cannot store as it is."""

import errno
import fcntl
import json
import math
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from seal_engine.files import show
from seal_engine.loop.settings import rename_old
from seal_engine.types import InputError, require

SCHEMA_VERSION = 3
APPLICATION_ID = 0x5EA1  # in the database's header: it is ours
BUSY_SECONDS = 60.0  # how long to wait for someone who writes to the database by hand
SCHEMA = """
CREATE TABLE run (schema_version INTEGER NOT NULL, started TEXT NOT NULL, config TEXT NOT NULL);
CREATE TABLE steps (
    number INTEGER PRIMARY KEY, step TEXT NOT NULL UNIQUE, finished TEXT NOT NULL, seconds REAL NOT NULL,
    cpu_seconds REAL
);
CREATE TABLE metrics (
    number INTEGER PRIMARY KEY, step TEXT NOT NULL REFERENCES steps (step), name TEXT NOT NULL,
    value, is_nan INTEGER NOT NULL DEFAULT 0, UNIQUE (step, name)
);
CREATE TABLE self_edits (
    step TEXT NOT NULL REFERENCES steps (step),
    seed INTEGER NOT NULL, phase TEXT NOT NULL, context TEXT NOT NULL, "index" INTEGER NOT NULL,
    text TEXT NOT NULL, token_ids TEXT NOT NULL, sampling_seed INTEGER, attempts INTEGER NOT NULL, rejected TEXT,
    PRIMARY KEY (seed, phase, context, "index")
);
CREATE TABLE trials (
    step TEXT NOT NULL REFERENCES steps (step),
    seed INTEGER NOT NULL, phase TEXT NOT NULL, context TEXT NOT NULL, "index" INTEGER NOT NULL,
    repeat INTEGER NOT NULL, train_seed INTEGER NOT NULL, num_steps INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    final_loss REAL, final_loss_is_nan INTEGER NOT NULL DEFAULT 0, error TEXT,
    answers TEXT NOT NULL, grades TEXT NOT NULL, seconds REAL NOT NULL, losses TEXT NOT NULL,
    PRIMARY KEY (seed, phase, context, "index", repeat)
);
CREATE TABLE policies (
    step TEXT NOT NULL REFERENCES steps (step),
    seed INTEGER NOT NULL, round INTEGER NOT NULL, path TEXT, kept TEXT NOT NULL, num_steps INTEGER NOT NULL,
    final_loss REAL, final_loss_is_nan INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL,
    losses TEXT NOT NULL,
    PRIMARY KEY (seed, round)
);
CREATE INDEX self_edits_step ON self_edits (step);
CREATE INDEX trials_step ON trials (step);
CREATE INDEX policies_step ON policies (step);
"""
MIGRATIONS = {  # from a version to the next one
    1: """
ALTER TABLE units RENAME TO steps;
ALTER TABLE steps RENAME COLUMN unit TO step;
ALTER TABLE metrics RENAME COLUMN unit TO step;
ALTER TABLE self_edits RENAME COLUMN unit TO step;
ALTER TABLE self_edits RENAME COLUMN refused TO rejected;
ALTER TABLE trials RENAME COLUMN unit TO step;
ALTER TABLE policies RENAME COLUMN unit TO step;
DROP INDEX self_edits_unit;
DROP INDEX trials_unit;
DROP INDEX policies_unit;
CREATE INDEX self_edits_step ON self_edits (step);
CREATE INDEX trials_step ON trials (step);
CREATE INDEX policies_step ON policies (step);
UPDATE metrics SET name = 'rejected' WHERE name = 'refused';
""",
    2: """
ALTER TABLE steps ADD COLUMN cpu_seconds REAL;
ALTER TABLE trials ADD COLUMN losses TEXT NOT NULL DEFAULT '[]';
ALTER TABLE policies ADD COLUMN losses TEXT NOT NULL DEFAULT '[]';
""",
}
DISK_SPACE = "room on the disk (then run the same command again: it goes on from what is finished)"
WRITABLE_DIRECTORY = "a directory that can be read and written"
HINTS = {
    sqlite3.SQLITE_FULL: DISK_SPACE,
    sqlite3.SQLITE_IOERR: f"a disk that works and has {DISK_SPACE}",
    sqlite3.SQLITE_READONLY: WRITABLE_DIRECTORY,
    sqlite3.SQLITE_CANTOPEN: WRITABLE_DIRECTORY,
    sqlite3.SQLITE_BUSY: "that no other program writes to the ledger (close it, and run the same command again)",
    sqlite3.SQLITE_CORRUPT: "a ledger that is whole (put a copy of the directory in its place, or use a new one)",
}
HINTS[sqlite3.SQLITE_NOTADB] = HINTS[sqlite3.SQLITE_CORRUPT]


def connect(file: Path, mode: str, stack: ExitStack) -> sqlite3.Connection:
    """A connection that the stack closes. mode: as in SQLite's URIs."""
    # isolation_level None: without Python's own transactions, for each is begun and ended here.
    connection = sqlite3.connect(f"{file.as_uri()}?mode={mode}", timeout=BUSY_SECONDS, isolation_level=None, uri=True)
    stack.callback(connection.close)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # with WAL, NORMAL would lose the last units to a power cut
    return connection


def create(connection: sqlite3.Connection, config: dict[str, Any]) -> None:
    """Make the tables of a new run."""
    connection.execute("PRAGMA journal_mode = WAL")  # readers and the run never wait for each other
    with transaction(connection):
        _execute_all(connection, SCHEMA)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        row = SCHEMA_VERSION, now(), json.dumps(config)
        connection.execute("INSERT INTO run VALUES (?, ?, ?)", row)


def hold_side_files(connection: sqlite3.Connection, stack: ExitStack) -> None:
    """Write ahead in files beside the database (-wal, -shm) until the stack is closed; then it is one file again.

    A file in WAL mode would get both back from whoever reads it next.
    """
    connection.execute("PRAGMA journal_mode = WAL")
    stack.callback(_drop_side_files, connection)


def _drop_side_files(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA busy_timeout = 0")
    # Somebody reads, or the disk is full: what was finished is safe in the side files, and the next one to open the run
    # tries again.
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode = DELETE")


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a run of an earlier version up to date: tables, columns and the names of its settings."""
    version = schema_version(connection)
    if version == SCHEMA_VERSION:
        return
    with transaction(connection):
        for earlier in range(version, SCHEMA_VERSION):
            _execute_all(connection, MIGRATIONS[earlier])
        config = rename_old(json.loads(connection.execute("SELECT config FROM run").fetchone()[0]))
        connection.execute("UPDATE run SET schema_version = ?, config = ?", [SCHEMA_VERSION, json.dumps(config)])


def schema_version(connection: sqlite3.Connection) -> Any:
    """The version of the schema that a run was written with."""
    return connection.execute("SELECT schema_version FROM run").fetchone()[0]


def _execute_all(connection: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";"):
        connection.execute(statement)


def validate_database(connection: sqlite3.Connection, file: Path) -> None:
    """InputError if it is no ledger, is of another version, or is damaged."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise InputError(f"{file}: found no ledger in it; accepted: a new directory, or one in which a run has begun")
    version = schema_version(connection)
    if version not in range(1, SCHEMA_VERSION + 1):
        accepted = f"1 to {SCHEMA_VERSION}, or a newer seal_engine"
        raise InputError(f"{file}: schema_version: found {version}; accepted: {accepted}")
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise InputError(f"{file}: damaged: {' '.join(damage.split())}; accepted: {HINTS[sqlite3.SQLITE_CORRUPT]}")


def lock(file: Path, stack: ExitStack) -> None:
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
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that the block executes is written, or nothing of it."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:  # after a full disk SQLite may have rolled back by itself
            connection.execute("ROLLBACK")


def result_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; text that is not UTF-8, which Python finds by itself, counts as damage."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """InputError for failures of the disk and damaged files, with the path, the failure and a hint what to do."""
    try:
        yield
    except sqlite3.ProgrammingError:  # such as a closed ledger: no fault of the disk
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: found: {error}; accepted: {HINTS[sqlite3.SQLITE_CORRUPT]}") from error
    except sqlite3.DatabaseError as error:
        accepted = HINTS.get(result_code(error), "a ledger that seal_engine alone has written")
        raise InputError(f"{path}: found: {error}; accepted: {accepted}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise InputError(f"{path}: found: {error}; accepted: {DISK_SPACE if full else WRITABLE_DIRECTORY}") from error


def to_column(name: str, value: Any) -> Any:
    """A value as SQLite can hold it: lists as JSON text, NaN as NULL, half surrogates, which are not text, as bytes."""
    if isinstance(value, tuple | list):
        try:
            return json.dumps(value, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: found {show(value)}: {error}; accepted: text and numbers") from None
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        return encoded if encoded.decode("utf-8", "replace") != value else value
    valid = value is None or isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)
    require(valid, name, value, "text, a number (an integer of at most 64 bits) or None")
    return None if is_nan(value) else value


def from_column(value: Any) -> Any:
    """The inverse of to_column for texts."""
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


def is_nan(value: Any) -> bool:
    """True for a float that is NaN."""
    return isinstance(value, float) and math.isnan(value)


def now() -> str:
    """The time, UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
