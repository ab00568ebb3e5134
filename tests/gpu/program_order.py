"""Programs of a launch in random order in Triton's interpreter, and an error where two of them meet.

On a GPU the programs of a launch run at once and in no order. The interpreter runs one after another, so a kernel whose
programs depend on each other is right there and wrong on a GPU. Two programs meet where one of them writes an element
that the other one reads or writes; what they leave depends on who comes first then, whatever the interpreter shows.

Not seen: threads of one program that meet, and the masked elements of a load, which a GPU does not read either.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

ALLOWED_TO_MEET: dict[str, str] = {}  # name of a kernel -> why its programs may meet


class ProgramsMeetError(AssertionError):
    """What a launch leaves depends on the order of its programs."""


class Access(NamedTuple):
    """The elements that one load or store of a program touches."""

    program: int  # its place in the order
    writes: bool
    addresses: np.ndarray  # [elements] uint64, in bytes
    item_size: int  # bytes of an element


class Meeting(NamedTuple):
    what: str
    programs: tuple[int, int]
    address: int


class Launch:
    """The programs of one launch in their order, and what those that ran have touched."""

    def __init__(self, grid: tuple[int, int, int], generator: random.Random):
        self.grid = grid
        self.programs = list(itertools.product(*map(range, grid)))
        generator.shuffle(self.programs)
        self.running = -1
        self.accesses: list[Access] = []

    def start_program(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        """The program that runs where the interpreter would run program (x, y, z)."""
        self.running = (x * self.grid[1] + y) * self.grid[2] + z
        return self.programs[self.running]

    def record(self, pointers: Any, mask: Any, writes: bool) -> None:
        """Record a load or store through the handles `pointers` and `mask` (None: all elements)."""
        if len(self.programs) == 1:
            return
        addresses = pointers.data
        if mask is not None and not mask.data.all():
            addresses, kept = np.broadcast_arrays(addresses, mask.data)
            addresses = addresses[kept]
        if addresses.size:
            item_size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.accesses.append(Access(self.running, writes, addresses.ravel(), item_size))


def find_meeting(accesses: list[Access]) -> Meeting | None:
    """Two programs, one of which writes what the other one reads or writes; None if there are none.

    Elements of several sizes are cut into cells as large as the smallest of them.
    """
    writes = [access for access in accesses if access.writes]
    if not writes:
        return None
    cell_size = min(access.item_size for access in accesses)

    def cells_of(access: Access) -> np.ndarray:
        first = access.addresses // np.uint64(cell_size)
        parts = np.arange(access.item_size // cell_size, dtype=np.uint64)
        return (first[:, None] + parts).ravel()

    written = [cells_of(access) for access in writes]
    cells = np.concatenate(written)
    writers = np.repeat([access.program for access in writes], [len(part) for part in written])
    by_cell = cells.argsort(kind="stable")
    cells, writers = cells[by_cell], writers[by_cell]
    twice = np.flatnonzero((cells[1:] == cells[:-1]) & (writers[1:] != writers[:-1]))
    if len(twice):
        i = twice[0]
        return Meeting("both write", (int(writers[i]), int(writers[i + 1])), int(cells[i]) * cell_size)

    for access in accesses:
        if access.writes:
            continue
        # Most loads are far from all stores, and need no look at their elements.
        ends = np.array([access.addresses.min(), access.addresses.max()]) // np.uint64(cell_size)
        first = np.searchsorted(cells, ends[0])
        last = np.searchsorted(cells, ends[1] + np.uint64(access.item_size // cell_size))
        if first == last:
            continue
        read = cells_of(access)
        at = np.searchsorted(cells, read).clip(max=len(cells) - 1)
        met = np.flatnonzero((cells[at] == read) & (writers[at] != access.program))
        if len(met):
            i = met[0]
            return Meeting(
                "the first reads what the second writes",
                (access.program, int(writers[at[i]])),
                int(read[i]) * cell_size,
            )
    return None


def _argument_at(address: int, arguments: dict[str, Any]) -> str:
    """The kernel's argument in whose storage the address is."""
    for name, value in arguments.items():
        if hasattr(value, "untyped_storage"):
            storage = value.untyped_storage()
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return f"byte {address - value.data_ptr()} of {name}"
    return f"address {address:#x}, of no argument"


class _Operation(NamedTuple):
    pointers: int  # place among the arguments
    mask: int | None
    writes: bool


_MEMORY_OPERATIONS = {
    "create_masked_load": _Operation(pointers=0, mask=1, writes=False),
    "create_masked_store": _Operation(pointers=0, mask=2, writes=True),
    "create_atomic_rmw": _Operation(pointers=1, mask=3, writes=True),
    "create_atomic_cas": _Operation(pointers=0, mask=None, writes=True),
}


@contextmanager
def random_program_order(seed: int | str, allowed: Mapping[str, str] = ALLOWED_TO_MEET) -> Iterator[None]:
    """Every launch in here runs its programs in an order that follows from `seed`.

    Raises ProgramsMeetError after a launch in which two programs meet, except of the kernels in `allowed`.
    """
    generator = random.Random(seed)
    launch: Launch | None = None
    set_grid_dim, set_grid_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    execute = GridExecutor.__call__

    def start_launch(self, *grid):
        nonlocal launch
        launch = Launch(grid, generator)
        set_grid_dim(self, *grid)

    def start_program(self, *index):
        assert launch is not None
        set_grid_idx(self, *launch.start_program(*index))

    def recorded(name: str, operation: _Operation):
        run = getattr(InterpreterBuilder, name)

        def record_and_run(self, *args, **kwargs):
            if launch is not None:
                mask = None if operation.mask is None else args[operation.mask]
                launch.record(args[operation.pointers], mask, operation.writes)
            return run(self, *args, **kwargs)

        return record_and_run

    def execute_and_check(self, *args, **kwargs):
        nonlocal launch
        try:
            execute(self, *args, **kwargs)
            finished = launch
        finally:
            launch = None
        name = self.fn.__name__
        if finished is None or name in allowed:
            return
        meeting = find_meeting(finished.accesses)
        if meeting is not None:
            first, second = (finished.programs[program] for program in meeting.programs)
            where = _argument_at(meeting.address, dict(zip(self.arg_names, args, strict=False)) | kwargs)
            raise ProgramsMeetError(f"{name}: programs {first} and {second} meet at {where}: {meeting.what}")

    patches = {name: recorded(name, operation) for name, operation in _MEMORY_OPERATIONS.items()}
    patches |= {"set_grid_dim": start_launch, "set_grid_idx": start_program}
    with (
        mock.patch.multiple(InterpreterBuilder, **patches),
        mock.patch.object(GridExecutor, "__call__", execute_and_check),
    ):
        yield
