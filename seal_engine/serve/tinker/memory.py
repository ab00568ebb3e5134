"""Device memory for the models that clients train: their states come and go, so that there may be more than fit.

A model's state is its parameters, gradients and moments, 16 bytes for each parameter. It is on the device while a
request of the model is at the worker. Afterwards it stays there until others need the room; then the states that were
used longest ago move to pinned host memory. On a CPU, whose memory is the host's, gradients and moments move to files.
Whoever needs room waits for it in the order of arrival, and nobody overtakes: a model waits for at most one request,
or piece of one, of each other model.
"""

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import Tensor

from seal_engine.files import write_errors
from seal_engine.model.adapters import Adapter
from seal_engine.model.devices import is_memory_error
from seal_engine.serve.requests import FailedError
from seal_engine.serve.worker import Worker

T = TypeVar("T")


class ModelState:
    """The adapter of a model, with its gradients and moments on the device or elsewhere."""

    def __init__(self, adapter: Adapter):
        """An adapter without gradients and moments: `move_in` makes them, zero."""
        self.adapter = adapter
        self.nbytes = 4 * adapter.nbytes  # on the device
        self._host: Tensor | None = None  # gradients and moments, [3, parameters]
        self._file: IO[bytes] | None = None  # which is deleted with this object

    def move_out(self) -> None:
        """Leave the device, unless that was done. InputError, and nothing has changed, where the disk is full."""
        state = self.adapter.optimizer_state
        if state is None:
            return
        if state.device.type == "cuda":
            self._host = torch.empty(state.shape, pin_memory=True).copy_(state)
        else:
            file = tempfile.NamedTemporaryFile(prefix="seal-engine-model-")  # noqa: SIM115
            with write_errors(Path(file.name)):
                state.numpy().tofile(file)
                file.flush()
            self._file = file
        self.adapter.release_optimizer_state()
        self.adapter.offload()

    def move_in(self) -> None:
        """Come back, exactly as it left."""
        adapter, steps = self.adapter, self.adapter.steps
        adapter.allocate_optimizer_state()
        assert adapter.optimizer_state is not None
        if self._host is not None:
            adapter.optimizer_state.copy_(self._host)
            adapter.steps = steps
        elif self._file is not None:
            self._file.seek(0)
            self._file.readinto(adapter.optimizer_state.numpy())  # type: ignore[attr-defined]
            adapter.steps = steps
        self.forget()

    def forget(self) -> None:
        """Let go of what lies elsewhere."""
        self._host = self._file = None


class ModelMemory:
    """The states of all models. Its methods run on the event loop; states move between two turns of the worker."""

    def __init__(self, worker: Worker, max_bytes: int):
        """max_bytes: of states on the device; one that is larger is there alone."""
        self.worker = worker
        self.max_bytes = max_bytes
        self.num_moves = 0  # of states from the device
        self._resident: OrderedDict[ModelState, None] = OrderedDict()  # the one used last at the end
        self._in_use: set[ModelState] = set()
        self._turn = asyncio.Lock()  # whoever waits for room holds it: the others queue behind
        self._released = asyncio.Event()

    @property
    def nbytes(self) -> int:
        """Bytes of the states on the device."""
        return sum(state.nbytes for state in self._resident)

    @asynccontextmanager
    async def use(self, state: ModelState) -> AsyncIterator[None]:
        """The state is on the device in this block. FailedError where the device has no memory for it after all."""
        async with self._turn:
            await self._make_room(state)
            self._resident[state] = None
            self._resident.move_to_end(state)
            self._in_use.add(state)
        try:
            if state.adapter.grads is None:
                await self.call(state.move_in)
            yield
        finally:
            self._in_use.discard(state)
            self._released.set()

    async def _make_room(self, state: ModelState) -> None:
        """Move out states that are not in use, and wait for those that are, until there is room or no other state."""
        while state not in self._resident and self._resident and self.nbytes + state.nbytes > self.max_bytes:
            idle = next((other for other in self._resident if other not in self._in_use), None)
            if idle is None:
                self._released.clear()
                await self._released.wait()
            else:
                await self.call(idle.move_out)
                self._resident.pop(idle, None)
                self.num_moves += 1

    def drop(self, state: ModelState) -> None:
        """Forget the state of a model that is gone."""
        self._resident.pop(state, None)
        state.forget()
        self._released.set()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function between two turns of the worker. FailedError where memory fails it."""
        try:
            return await asyncio.wrap_future(self.worker.call(lambda _: function()))
        except Exception as error:
            if is_memory_error(error):
                raise FailedError(f"out of memory: {error}") from None
            raise
