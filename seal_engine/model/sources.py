"""Where a parameter's numbers lie in files, and how they get from there to the model: mapped, converted, copied once.

Files are memory-mapped, and the pages that were read are given back at once, so that peak memory is the model plus one
piece of a tensor.
"""

import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from seal_engine.model.gguf import StoredGGUFTensor
from seal_kernels.linear import FrozenWeight

PIECE_ELEMENTS = 1 << 22  # of a tensor that are converted at a time


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a safetensors file lies: its file, name there, dtype, shape and bytes."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, or of a vector's element."""
        return (self.stop - self.start) // max(1, self.shape[0])

    def values(self, stored: Tensor) -> Tensor:
        """The numbers that bytes [rows * row_bytes] uint8 stand for: [rows, ...]."""
        return stored.view(self.dtype).view(-1, *self.shape[1:])


class MappedFiles:
    """Files, each mapped when it is first read, until the block ends."""

    def __init__(self):
        self._maps: dict[Path, mmap.mmap] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "MappedFiles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def read(self, file: Path, start: int, stop: int) -> Tensor:
        """Bytes of a file, [stop - start] uint8: a view of the map, valid until they are released."""
        if file not in self._maps:
            with open(file, "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[file] = self._stack.enter_context(mapped)
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._maps[file], dtype=torch.uint8, count=stop - start, offset=start)

    def release(self, file: Path, start: int, stop: int) -> None:
        """Give back the pages of bytes that were read."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._maps[file].madvise(mmap.MADV_DONTNEED, first, stop - first)


class Source(Protocol):
    """What fills one parameter."""

    @property
    def file(self) -> Path:
        """Named in errors, and read in this order."""
        ...

    @property
    def name(self) -> str:
        """In the file, for errors."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        ...

    @property
    def start(self) -> int:
        """Where in the file it begins."""
        ...

    def fill(self, files: MappedFiles, parameter: FrozenWeight) -> None:
        """Copy the numbers to a parameter of this shape."""
        ...


@dataclass(frozen=True)
class FloatSource:
    """One stored tensor of numbers. row_order: int64 [rows], where each stored row goes; None: they stay in order."""

    stored: StoredTensor | StoredGGUFTensor
    row_order: Tensor | None = None

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def start(self) -> int:
        return self.stored.start

    def fill(self, files: MappedFiles, parameter: FrozenWeight) -> None:
        assert isinstance(parameter, Tensor)
        for first, last, values in self.pieces(files):
            rows = slice(first, last) if self.row_order is None else self.row_order[first:last].to(parameter.device)
            parameter[rows] = values.to(parameter.device, parameter.dtype)

    def pieces(self, files: MappedFiles) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, last row, values), some rows at a time; values are valid until the next are asked for."""
        stored, rows = self.stored, self.shape[0]
        step = max(1, PIECE_ELEMENTS * rows // max(1, torch.Size(self.shape).numel()))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            start, stop = (stored.start + row * stored.row_bytes for row in (first, last))
            yield first, last, stored.values(files.read(stored.file, start, stop))
            files.release(stored.file, start, stop)
