"""Models that clients train: an adapter each, and requests that run in the order of their seq_id.

A client sends the requests of a model in any order, and again when a connection was cut: request n runs once all before
it have. A request that fails counts as run, so that those after it go on. Each model has one request at the worker at a
time, in pieces of at most one pass's tokens; so models that train at the same time share passes and steps, and none
waits for more than one piece of each other model. memory.py says what happens where not all fit the device.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from weakref import ReferenceType, ref

from seal_engine.model.adapters import Adapter
from seal_engine.serve.errors import ApiError
from seal_engine.serve.tinker.checkpoints import Stored
from seal_engine.serve.tinker.data import read_data, write_output
from seal_engine.serve.tinker.memory import ModelMemory, ModelState
from seal_engine.serve.tinker.promises import Promise, Promises, Reply, json_reply
from seal_engine.serve.worker import Worker
from seal_engine.training.jobs import AdamParams
from seal_engine.training.verbs import validate_data
from seal_engine.types import InputError, LoraConfig, chunks, require

GAP_SECONDS = 120.0  # that requests wait for one before them that has not arrived
MAX_WAITING = 1024  # requests of a model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Operation = Callable[[], Awaitable[Reply]]


@dataclass(frozen=True)
class ModelConfig:
    """What a client asks of a model when it creates it."""

    base_model: str
    rank: int
    alpha: float
    seed: int
    train_attn: bool
    train_mlp: bool
    user_metadata: dict[str, Any] | None

    @staticmethod
    def of_checkpoint(info: Mapping[str, Any], user_metadata: dict[str, Any] | None) -> "ModelConfig":
        """Of a model that a checkpoint will be loaded into."""
        return ModelConfig(
            info["base_model"],
            info["lora_rank"],
            info["lora_alpha"],
            info["seed"],
            info["train_attn"],
            info["train_mlp"],
            user_metadata,
        )

    def lora(self) -> LoraConfig:
        """The adapter's configuration. InputError where nothing is to be trained that can be."""
        targets = (*(ATTENTION if self.train_attn else ()), *(MLP if self.train_mlp else ()))
        accepted = "train_attn or train_mlp: adapters of the unembedding are not supported"
        require(len(targets) > 0, "lora_config", "train_unembed alone", accepted)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)
        config.check()
        return config

    @property
    def info(self) -> dict[str, Any]:
        """What a checkpoint says of the model."""
        return {
            "base_model": self.base_model,
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "seed": self.seed,
            "train_attn": self.train_attn,
            "train_mlp": self.train_mlp,
            "user_metadata": self.user_metadata,
        }


class TrainedModel:
    """A model of a client. Its methods run on the event loop; `state` is None until it has been created."""

    def __init__(self, model_id: str, config: ModelConfig, worker: Worker, memory: ModelMemory, promises: Promises):
        self.model_id = model_id
        self.config = config
        self.worker = worker
        self.memory = memory
        self.promises = promises
        self.state: ModelState | None = None
        self.next_seq = 1  # the request that runs next
        self.last_request = datetime.now(UTC)
        self._waiting: dict[int, tuple[Promise, Operation]] = {}
        self._arrived = asyncio.Event()
        self._failure: str | None = None  # of a forward_backward since the last optim_step
        self._snapshot: tuple[int, ReferenceType[Adapter]] | None = None  # (version, copy, while samplers have it)
        self._runner = asyncio.create_task(self._run())

    @property
    def trained(self) -> ModelState:
        """The adapter and its optimizer's state. InputError if the model could not be created."""
        if self.state is None:
            raise InputError(f"model_id: {self.model_id} was not created")
        return self.state

    def end(self) -> None:
        """Run no more requests; what is at the worker ends there."""
        self._runner.cancel()
        if self.state is not None:
            self.memory.drop(self.state)

    # Order

    def submit(self, seq_id: int | None, kind: str, operation: Operation) -> Promise:
        """Queue a request, or meet the promise of the same request if it was submitted before.

        Raises ApiError: 410 for a request that ran long ago, 429 while too many wait.
        """
        self.last_request = datetime.now(UTC)
        if seq_id is None:
            seq_id = max([self.next_seq - 1, *self._waiting]) + 1
        if not 1 <= seq_id < 2**31:
            raise ApiError(400, f"seq_id: found {seq_id}; accepted: a number from 1", "seq_id")
        key = (self.model_id, seq_id)
        promise = self.promises.retried(key, kind)
        if promise is not None:
            return promise
        if seq_id < self.next_seq:
            raise ApiError(410, f"seq_id: {seq_id} has run, and its result is gone", "seq_id")
        if len(self._waiting) >= MAX_WAITING and seq_id != self.next_seq:
            raise ApiError(429, f"seq_id: {len(self._waiting)} requests of this model wait; send it again later")
        promise = self.promises.add(key, kind, model_id=self.model_id)
        self._waiting[seq_id] = promise, operation
        self._arrived.set()
        return promise

    async def _run(self) -> None:
        """Run requests in their order, one at a time."""
        while True:
            promise, operation = await self._next()
            try:
                promise.settle(await operation())
            except Exception as error:
                promise.settle(error)

    async def _next(self) -> tuple[Promise, Operation]:
        """The next request. Where it does not come, those behind it fail, and the order goes on after them."""
        while self.next_seq not in self._waiting:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), GAP_SECONDS if self._waiting else None)
            except TimeoutError:
                error = InputError(
                    f"seq_id: {self.next_seq} has not arrived in {GAP_SECONDS:.0f} s; this waited for it"
                )
                self.next_seq = max(self._waiting) + 1
                for promise, _ in self._waiting.values():
                    promise.settle(error)
                self._waiting.clear()
        self.next_seq += 1
        return self._waiting.pop(self.next_seq - 1)

    # Requests

    async def create(self) -> Reply:
        """Draw the adapter, with gradients and moments of zero: a step before any forward_backward is one on zeros."""
        lora = self.config.lora()

        def create() -> ModelState:
            adapter = self.worker.engine.create_adapter(lora, self.config.seed)
            adapter.offload()  # until there is room
            return ModelState(adapter)

        self.state = await self.memory.call(create)
        async with self.memory.use(self.state):
            return json_reply({"model_id": self.model_id, "type": "create_model"})

    async def forward_backward(self, request: Any) -> Reply:
        """A ForwardBackwardRequest, or its forward pass alone."""
        engine, verb = self.worker.engine, self.worker.forward if request.forward_only else self.worker.forward_backward
        try:
            data = await asyncio.to_thread(read_data, request, self.trained.adapter)
            await asyncio.to_thread(validate_data, engine.model, data)
            results = []
            budget = self.worker.engine.token_budget
            for piece in chunks([len(datum.token_ids) for datum in data], budget):
                async with self.memory.use(self.trained):
                    results += await asyncio.wrap_future(verb([data[i] for i in piece], bounded=False))
        except Exception as error:
            if not request.forward_only:
                self._failure = str(error)
            raise
        return Reply(await asyncio.to_thread(write_output, results), "application/x-protobuf")

    async def optim_step(self, params: AdamParams) -> Reply:
        """One step of AdamW on the gradients since the last one.

        InputError if a forward_backward since then failed, or the gradients are not finite: parameters and moments stay
        as they are, gradients are dropped.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            await self._call(lambda adapter: None if adapter.grads is None else adapter.grads.zero_())
            raise InputError(f"optim_step: no step, and gradients are dropped: a forward_backward failed: {failure}")
        async with self.memory.use(self.trained):
            step = self.worker.optim_step([(self.trained.adapter, params)], bounded=False)
            norms = await asyncio.wrap_future(step)
        if not math.isfinite(norms[0]):
            raise InputError(f"optim_step: no step, and gradients are dropped: their norm is {norms[0]}")
        return json_reply({"metrics": {"grad_norm": norms[0]}})

    async def snapshot(self) -> Adapter:
        """The adapter as it is now, which no later step changes: one copy for each version."""
        version = self.trained.adapter.version
        copy = self._snapshot[1]() if self._snapshot is not None and self._snapshot[0] == version else None
        if copy is None:
            copy = await self._call(Adapter.copy)
            self._snapshot = version, ref(copy)
        return copy

    async def stored(self) -> Stored:
        """A copy of the adapter and its optimizer, to be saved."""

        def copy(adapter: Adapter) -> Stored:
            moments = adapter.moments
            assert moments is not None
            info = {**self.config.info, "steps": adapter.steps}
            return Stored(adapter.copy(), (moments[0].clone(), moments[1].clone()), info)

        return await self._call(copy)

    async def restore(self, stored: Stored) -> None:
        """Go on from a checkpoint. InputError unless its adapter has this model's layout."""
        adapter = self.trained.adapter
        same = adapter.layout.ranks.tolist() == stored.adapter.layout.ranks.tolist()
        same = same and adapter.layout.scales.tolist() == stored.adapter.layout.scales.tolist()
        found = f"a checkpoint of rank {stored.adapter.config.r} and alpha {stored.adapter.config.lora_alpha}"
        accepted = f"rank {adapter.config.r}, alpha {adapter.config.lora_alpha} and the same targets"
        require(same, "path", found, accepted)
        await self._call(lambda adapter: install(adapter, stored))

    async def _call(self, function: Callable[[Adapter], Any]) -> Any:
        """Run a function of the adapter between two turns of the worker. FailedError where memory fails it."""
        state = self.trained
        async with self.memory.use(state):
            return await self.memory.call(lambda: function(state.adapter))


def install(adapter: Adapter, stored: Stored) -> None:
    """Give an adapter a checkpoint's parameters and, if it has them, moments; otherwise these start at zero."""
    adapter.params.copy_(stored.adapter.params)
    adapter.release_optimizer_state()
    adapter.allocate_optimizer_state()
    if stored.moments is not None and adapter.moments is not None:
        for own, saved in zip(adapter.moments, stored.moments, strict=True):
            own.copy_(saved)
        adapter.steps = stored.info["steps"]
    adapter.touch()
