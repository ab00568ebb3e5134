"""The container of a GGUF file: its metadata, and where its tensors lie. Nothing is read but the header.

A file is little-endian: the magic "GGUF", a version, the numbers of tensors and of metadata entries, the entries (a
key, a type, a value), the tensors (a name, sizes from the fastest-moving on, a type, an offset), and from the next
multiple of general.alignment on the tensors' bytes. The types of tensors, their block sizes and how a block becomes
numbers come from the `gguf` library. The header is parsed here: the library's reader makes several arrays per string,
which takes seconds for a vocabulary, and meets a damaged file with an exception of NumPy's.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seal_engine.files import show
from seal_engine.types import InputError

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
# Types of metadata values that have a size: their format for struct and NumPy.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
KINDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", list: "an array"}
# Types of tensors, by the library's names.
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_gguf(path: Path) -> bool:
    """Whether the path names a GGUF file."""
    return path.suffix == ".gguf" and not path.is_dir()


def gguf_library(path: Path) -> ModuleType:
    """The `gguf` library. InputError that names the extra where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise InputError(
            f"{path}: the gguf library is not installed; accepted: pip install 'seal-engine[gguf]'"
        ) from None
    return gguf


@dataclass(frozen=True)
class StoredGGUFTensor:
    """Where a tensor lies: its file, name there, type, shape (slowest-moving first) and bytes."""

    file: Path
    name: str
    type_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row, which is a whole number of blocks; of a vector's element."""
        return (self.stop - self.start) // max(1, self.shape[0])

    def values(self, stored: Tensor) -> Tensor:
        """The numbers that bytes [rows * row_bytes] uint8 stand for: [rows, ...], as stored or float32 of blocks."""
        if self.type_name in FLOATS:
            return stored.view(FLOATS[self.type_name]).view(-1, *self.shape[1:])
        library = gguf_library(self.file)
        blocks = stored.view(-1, self.row_bytes).numpy()
        with np.errstate(all="ignore"):  # a block of garbage is numbers that are not finite, no warning
            return torch.from_numpy(library.dequantize(blocks, library.GGMLQuantizationType[self.type_name]))


class GGUFFile:
    """A GGUF file's metadata and tensors. Raises InputError naming the file, and the key or tensor."""

    def __init__(self, path: Path):
        self.path = path
        self._library = gguf_library(path)
        self._position = 0
        try:
            with open(path, "rb") as stream:
                self._file: Any = mmap(stream.fileno(), 0, access=ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}; accepted: a file") from None
        with self._file:
            self.metadata, self.tensors = self._read()
        del self._file

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key if it is of `kind`: str, int, float (an integer, too), bool or list; default if absent."""
        value = self.metadata.get(key)
        if value is None:
            return default
        numbers = (int, float) if kind is float else kind
        if not isinstance(value, numbers) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.path}: {key}: found {show(value)}; accepted: {KINDS[kind]}")
        return value

    def require(self, key: str, kind: type) -> Any:
        """The value of a key. InputError where it is absent."""
        value = self.get(key, kind)
        if value is None:
            raise InputError(f"{self.path}: {key} is missing from the metadata; accepted: {KINDS[kind]}")
        return value

    def _read(self) -> tuple[dict[str, Any], dict[str, StoredGGUFTensor]]:
        if self._bytes(4, "the magic") != b"GGUF":
            raise InputError(f"{self.path}: does not begin with GGUF; accepted: a GGUF file")
        version = self._scalar(4, "the version")
        if version not in VERSIONS:
            raise InputError(f"{self.path}: found GGUF version {version}; accepted: {VERSIONS}, little-endian")
        num_tensors, num_entries = self._scalar(10, "the number of tensors"), self._scalar(10, "the number of keys")
        metadata: dict[str, Any] = {}
        for number in range(num_entries):
            key = self._string(f"key {number}")
            if key in metadata:
                raise InputError(f"{self.path}: {key} is in the metadata twice")
            metadata[key] = self._value(self._scalar(4, key), key)
        infos = [self._tensor_info(number) for number in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise InputError(f"{self.path}: general.alignment: found {show(alignment)}; accepted: a power of two")
        data = -(-self._position // alignment) * alignment
        tensors = {}
        for name, type_number, shape, offset in infos:
            if name in tensors:
                raise InputError(f"{self.path}: tensor {name} is there twice")
            tensors[name] = self._stored(name, type_number, shape, data + offset)
        return metadata, tensors

    def _tensor_info(self, number: int) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string(f"the name of tensor {number}")
        count = self._scalar(4, name)
        if not 1 <= count <= MAX_DIMENSIONS:
            raise InputError(f"{self.path}: tensor {name}: found {count} dimensions; accepted: 1 to {MAX_DIMENSIONS}")
        sizes = [self._scalar(10, name) for _ in range(count)]
        return name, self._scalar(4, name), tuple(reversed(sizes)), self._scalar(10, name)

    def _stored(self, name: str, type_number: int, shape: tuple[int, ...], start: int) -> StoredGGUFTensor:
        types = self._library.GGMLQuantizationType
        type_name = types(type_number).name if type_number in types._value2member_map_ else f"number {type_number}"
        if type_name not in TENSOR_TYPES:
            accepted = f"one of {list(TENSOR_TYPES)}"
            raise InputError(f"{self.path}: tensor {name}: found type {type_name}; accepted: {accepted}")
        block, block_bytes = self._library.GGML_QUANT_SIZES[types[type_name]]
        if shape[-1] % block:
            accepted = f"a multiple of {block}, the block of {type_name}"
            raise InputError(f"{self.path}: tensor {name}: found rows of {shape[-1]}; accepted: {accepted}")
        stop = start + prod(shape) // block * block_bytes
        if stop > len(self._file):
            raise InputError(
                f"{self.path}: tensor {name}: ends at byte {stop} of a file of {len(self._file)} (truncated?)"
            )
        return StoredGGUFTensor(self.path, name, type_name, shape, start, stop)

    def _value(self, value_type: int, key: str) -> Any:
        if value_type in SCALARS:
            return self._scalar(value_type, key)
        if value_type == STRING:
            return self._string(key)
        if value_type != ARRAY:
            raise InputError(f"{self.path}: {key}: found a value of type {value_type}; accepted: 0 to 12")
        value_type, count = self._scalar(4, key), self._scalar(10, key)
        if value_type in SCALARS:
            dtype = np.dtype(SCALARS[value_type])
            return np.frombuffer(self._bytes(count * dtype.itemsize, key), dtype).tolist()
        if value_type != STRING:
            raise InputError(f"{self.path}: {key}: found an array of type {value_type}; accepted: of text or numbers")
        return [self._string(key) for _ in range(count)]

    def _scalar(self, value_type: int, what: str) -> Any:
        dtype = np.dtype(SCALARS[value_type])
        return np.frombuffer(self._bytes(dtype.itemsize, what), dtype)[0].item()

    def _string(self, what: str) -> str:
        (length,) = struct.unpack("<Q", self._bytes(8, what))
        try:
            return self._bytes(length, what).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what}: not UTF-8: {error.reason}") from None

    def _bytes(self, count: int, what: str) -> bytes:
        start, self._position = self._position, self._position + count
        if self._position > len(self._file):
            raise InputError(f"{self.path}: {what}: the file ends before it (truncated?)")
        return self._file[start : self._position]
