"""Reading JSON that people wrote, and files and directories that appear complete or not at all."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from seal_engine.types import InputError

PARTIAL = ".partial."  # names of what is being written begin so


def show(value: Any) -> str:
    """A value for an error message, cut short, with its type."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of more than 4300 digits
        text = "too large to print"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def read_text(file: Path) -> str | None:
    """The file's text without a byte order mark, or None where there is no such file. InputError if it cannot be read
    or is not UTF-8."""
    try:
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; accepted: a file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: found bytes that are not UTF-8 ({error.reason}); accepted: UTF-8 text") from None


def read_json(file: Path, required: bool = True) -> dict[str, Any]:
    """The JSON object in a file. InputError if it holds anything else, or is missing; {} if that is allowed."""
    text = read_text(file)
    if text is None:
        if required:
            raise InputError(f"{file}: missing")
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {error}; accepted: a JSON object") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: found {show(value)}; accepted: a JSON object")
    return value


def strict_json(text: str) -> Any:
    """What JSON text holds. ValueError for anything else: NaN and infinities, and a key twice in one object, too."""
    return json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # nobody can say which of the two was meant
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r:.80} twice in one object")
    return value


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. OSError where that fails; the library has an error class of its own for a full disk."""
    try:
        save_file(dict(tensors), file, dict(metadata))
    except SafetensorError as error:
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from None


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """InputError naming the path where the disk refuses what the block writes; it may be full."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def complete_file(file: Path) -> Iterator[Path]:
    """A name to write to; it becomes `file`, its bytes on the disk, if the block succeeds, and vanishes if it fails."""
    partial = file.with_name(f"{PARTIAL}{os.getpid()}.{file.name}")
    try:
        yield partial
        flush(partial)  # a power cut must not leave the new name on an empty file
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(file: Path, content: bytes) -> Path:
    """Write a file that appears whole or not at all. InputError where it cannot be written."""
    with write_errors(file), complete_file(file) as partial:
        partial.write_bytes(content)
    return file


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def complete_directory(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory` if the block succeeds and vanishes if it fails.

    InputError for a directory that is neither new nor empty.
    """
    try:
        directory = Path(os.path.realpath(directory))  # a link to an empty directory is one
        if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
            raise FileExistsError("exists")
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=directory.parent))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{directory}: {error}; accepted: a new or empty directory") from None
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
