"""TinkerService: sessions with their models and samplers, and what their requests do.

A session ends when its client says so or has not been heard of for `session_seconds`; then its models and samplers are
gone, and their memory is free. What was saved stays on the disk.
"""

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seal_engine.model.devices import free_memory
from seal_engine.serve.errors import ApiError
from seal_engine.serve.requests import CancelledError, QueueFullError, SampleRequest
from seal_engine.serve.tinker import schemas
from seal_engine.serve.tinker.checkpoints import CheckpointPath, Checkpoints, Stored
from seal_engine.serve.tinker.memory import ModelMemory
from seal_engine.serve.tinker.models import ModelConfig, TrainedModel
from seal_engine.serve.tinker.promises import Promise, Promises, Reply, json_reply
from seal_engine.serve.tinker.samplers import Sampler, Snapshots, prompt_tokens, sample, sampling_params
from seal_engine.serve.worker import Worker
from seal_engine.training.jobs import AdamParams
from seal_engine.types import InputError, require

SWEEP_SECONDS = 1.0
log = logging.getLogger("seal_engine")


@dataclass(frozen=True)
class TinkerSettings:
    """What the server's options say."""

    directory: Path = Path("tinker-checkpoints")
    lora_alpha: float = 32.0
    max_models: int | None = None  # at once; others wait
    model_bytes: int | None = None  # of models' states on the device; None: half of what is free when the server starts
    session_seconds: float = 120.0  # without a sign of life
    snapshot_bytes: int = 2**32  # of samplers' adapters in memory


@dataclass(eq=False)
class Session:
    """What belongs to one client."""

    session_id: str
    body: schemas.CreateSession
    silent: float = 0.0  # seconds since the client was last heard of
    models: dict[str, TrainedModel] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)


class TinkerService:
    """Its methods run on the event loop."""

    def __init__(self, worker: Worker, base_names: Sequence[str], settings: TinkerSettings):
        self.worker = worker
        self.base_names = base_names
        self.settings = settings
        self.checkpoints = Checkpoints(settings.directory)
        self.promises = Promises()
        model_bytes = settings.model_bytes
        self.memory = ModelMemory(
            worker, free_memory(worker.engine.model.device) // 2 if model_bytes is None else model_bytes
        )
        self.snapshots = Snapshots(worker, settings.snapshot_bytes)
        self.sessions: dict[str, Session] = {}
        self._ended: set[str] = set()
        self._slots = asyncio.Semaphore(settings.max_models or 2**31)
        self._holders: set[str] = set()  # models that have a slot
        self._running: dict[str, tuple[Sampler, SampleRequest]] = {}  # by the ids of their promises
        self._tasks: set[asyncio.Task[None]] = set()  # referenced here, or they might be collected
        self._sweeper: asyncio.Task[None] | None = None

    # Sessions

    def create_session(self, body: schemas.CreateSession) -> str:
        """A new session."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        session_id = f"session-{secrets.token_hex(8)}"
        self.sessions[session_id] = Session(session_id, body)
        return session_id

    def session(self, session_id: str) -> Session:
        """A session, which has shown life by this. ApiError: 410 for one that ended, 404."""
        if session_id in self._ended:
            raise ApiError(410, f"session_id: {session_id} has ended", "session_id")
        if session_id not in self.sessions:
            raise ApiError(
                404, f"session_id: found {session_id!r:.100}; accepted: a session of this server", "session_id"
            )
        session = self.sessions[session_id]
        session.silent = 0.0
        return session

    def model(self, model_id: str) -> TrainedModel:
        """A model by its id. ApiError: 410 if its session ended, 404."""
        return self._member(model_id, "model_id", "models")

    def sampler(self, sampler_id: str) -> Sampler:
        """A sampler by its id, likewise."""
        return self._member(sampler_id, "sampling_session_id", "samplers")

    def _member(self, member_id: str, name: str, kind: str) -> Any:
        session = self.session(member_id.partition(":")[0])
        members = getattr(session, kind)
        if member_id not in members:
            raise ApiError(404, f"{name}: found {member_id!r:.100}; accepted: one of {list(members)[:20]}", name)
        return members[member_id]

    def end_session(self, session_id: str) -> None:
        """Free all that belongs to a session. What is at the worker ends there, unheard."""
        session = self.sessions.pop(session_id)
        self._ended.add(session_id)
        for model in session.models.values():
            model.end()
            if model.model_id in self._holders:
                self._holders.discard(model.model_id)
                self._slots.release()
        for sampler, request in self._running.values():
            if session.samplers.get(sampler.sampler_id) is sampler:
                self.worker.cancel(request)
        self.promises.end({session_id, *session.models, *session.samplers})
        used = {s.snapshot for other in self.sessions.values() for s in other.samplers.values()}
        freed = {s.snapshot for s in session.samplers.values()} - used
        self.snapshots.drop([snapshot for snapshot in freed if snapshot is not None])

    async def _sweep(self) -> None:
        """End sessions that nobody has heard of for too long. Time is counted in sweeps: while the process was stopped,
        heartbeats could not be heard."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for session in list(self.sessions.values()):
                session.silent += SWEEP_SECONDS
                if session.silent > self.settings.session_seconds:
                    log.warning("%s ends: no sign of life for %g s", session.session_id, session.silent)
                    self.end_session(session.session_id)

    def close(self) -> None:
        """End all sessions; who waits gets an error."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for session_id in list(self.sessions):
            self.end_session(session_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Models

    def check_base_model(self, name: str) -> None:
        """InputError unless it is a name of the base that is served."""
        require(name in self.base_names, "base_model", name, f"one of {list(self.base_names)}")

    def create_model(self, body: schemas.CreateModel) -> Promise:
        """A new model of a session; while there are max_models, it waits for one to go. InputError."""
        self.check_base_model(body.base_model)
        kind = body.optimizer_config.type
        require(kind == "adamw", "optimizer_config.type", kind, "'adamw'")
        lora, seed = body.lora_config, body.lora_config.seed
        width = self.worker.engine.config.hidden_size
        require(lora.rank <= width, "lora_config.rank", lora.rank, f"1 to {width}, the width of the model")
        config = ModelConfig(
            body.base_model,
            lora.rank,
            self.settings.lora_alpha,
            secrets.randbelow(2**31) if seed is None else seed,
            lora.train_attn,
            lora.train_mlp,
            body.user_metadata,
        )
        config.lora()
        return self._new_model(body.session_id, body.model_seq_id, "create_model", config, None)

    def _new_model(
        self, session_id: str, number: int, kind: str, config: ModelConfig, load: schemas.LoadWeights | None
    ) -> Promise:
        """Add a model to a session and create it, or load it; a retry meets the promise of the first request."""
        session = self.session(session_id)
        model_id = f"{session_id}:train:{number}"
        promise = self.promises.retried((model_id, 0), kind)
        if promise is not None:
            return promise
        if model_id in session.models:
            raise ApiError(410, f"model_seq_id: {number} was created, and the result is gone", "model_seq_id")
        model = TrainedModel(model_id, config, self.worker, self.memory, self.promises)
        session.models[model_id] = model
        promise = self.promises.add((model_id, 0), kind, model_id=model_id)
        promise.queue_state = "paused_capacity"
        self._spawn(self._create(model, promise, load))
        return promise

    async def _create(self, model: TrainedModel, promise: Promise, load: schemas.LoadWeights | None) -> None:
        await self._slots.acquire()
        if promise.result.done():  # its session ended while it waited
            self._slots.release()
            return
        self._holders.add(model.model_id)
        promise.queue_state = "active"
        try:
            reply = await model.create()
            if load is not None:
                reply = await self._load(model, load)
            promise.settle(reply)
        except Exception as error:
            promise.settle(error)

    def load_weights(self, body: schemas.Load) -> Promise:
        """A checkpoint onto a model, in the order of its requests, or as a new model of a session."""
        kind = schemas.LoadWeights
        if body.model_id is not None:
            model = self.model(body.model_id)
            return model.submit(body.seq_id, "load_weights", lambda: self._load(model, body.read(kind)))
        load = body.read(kind)
        if load.session_id is None or load.model_seq_id is None:
            raise InputError("model_id: found None; accepted: a model, or session_id and model_seq_id of a new one")
        info = self.checkpoints.info(CheckpointPath.parse(load.path))
        config = ModelConfig.of_checkpoint(info, load.user_metadata)
        return self._new_model(load.session_id, load.model_seq_id, "load_weights", config, load)

    async def _load(self, model: TrainedModel, body: schemas.LoadWeights) -> Reply:
        stored = await self.read(CheckpointPath.parse(body.path), body.optimizer)
        await model.restore(stored)
        return json_reply({"path": body.path, "model_id": model.model_id, "type": "load_weights"})

    async def read(self, path: CheckpointPath, optimizer: bool) -> Stored:
        """A checkpoint from the disk."""
        load = self.worker.engine.load_adapter
        return await asyncio.to_thread(self.checkpoints.load, path, load, optimizer)

    def forward_backward(self, request: Any) -> Promise:
        """A ForwardBackwardRequest, in the order of its model's requests."""
        model = self.model(request.model_id)
        kind = "forward" if request.forward_only else "forward_backward"
        return model.submit(request.seq_id, kind, lambda: model.forward_backward(request))

    def optim_step(self, body: schemas.Numbered) -> Promise:
        """A step, in the order of its model's requests."""
        model = self.model(body.model_id)

        async def step() -> Reply:
            adam = body.read(schemas.OptimStep).adam_params
            if adam is None:
                raise InputError("optimizer_params: found another optimizer's; accepted: adam_params")
            norm = adam.grad_clip_norm or None
            betas = (adam.beta1, adam.beta2)
            params = AdamParams(adam.learning_rate, betas, adam.eps, adam.weight_decay, norm)
            params.check()
            return await model.optim_step(params)

        return model.submit(body.seq_id, "optim_step", step)

    # Saving

    def save_weights(self, body: schemas.Numbered) -> Promise:
        """A checkpoint of a model with its optimizer, in the order of its requests."""
        model = self.model(body.model_id)

        async def save() -> Reply:
            asked = body.read(schemas.SaveWeights)
            return await self._save(model, "weights", asked, await model.stored())

        return model.submit(body.seq_id, "save_weights", save)

    def save_weights_for_sampler(self, body: schemas.Numbered) -> Promise:
        """A model as it is now, to sample from: under a path on the disk, or as a sampler in memory."""
        model = self.model(body.model_id)
        session_id = body.model_id.partition(":")[0]

        async def save() -> Reply:
            asked = body.read(schemas.SaveWeightsForSampler)
            adapter = await model.snapshot()
            if asked.path is not None:
                stored = Stored(adapter, None, model.config.info)
                return await self._save(model, "sampler_weights", asked, stored)
            if asked.sampling_session_seq_id is None:
                raise InputError("path: found None; accepted: a name, or sampling_session_seq_id")
            sampler_id = f"{session_id}:sample:{asked.sampling_session_seq_id}"
            snapshot = await self.snapshots.add(adapter)
            sampler = Sampler(sampler_id, model.config.base_model, None, snapshot)
            self.session(session_id).samplers[sampler_id] = sampler
            return json_reply({"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"})

        return model.submit(body.seq_id, "save_weights_for_sampler", save)

    def save_weights_external(self, body: schemas.Numbered) -> Promise:
        """Refuse an export, in the order of the model's requests."""

        async def refuse() -> Reply:
            advice = "each checkpoint's directory below --tinker-dir already is an adapter in PEFT's format"
            raise InputError(f"save_weights_external: not supported; save_weights_for_sampler works: {advice}")

        return self.model(body.model_id).submit(body.seq_id, "save_weights_external", refuse)

    async def _save(self, model: TrainedModel, kind: str, body: schemas.SaveWeights, stored: Stored) -> Reply:
        path = self.checkpoints.path_for(model.model_id, kind, body.path)
        stored.info = {**stored.info, "user_metadata": body.user_metadata}
        await asyncio.to_thread(self.checkpoints.save, path, stored, body.ttl_seconds, body.overwrite)
        return json_reply({"path": str(path)})

    # Sampling

    async def create_sampler(self, body: schemas.CreateSamplingSession) -> Sampler:
        """A sampler of the base or of a checkpoint; a retry meets the one of the first request."""
        session = self.session(body.session_id)
        sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
        if sampler_id in session.samplers:
            return session.samplers[sampler_id]
        base_model, snapshot = body.base_model, None
        if body.model_path is not None:
            stored = await self.read(CheckpointPath.parse(body.model_path), optimizer=False)
            base_model, snapshot = stored.info["base_model"], await self.snapshots.add(stored.adapter)
        if base_model is None:
            raise InputError("model_path: found None; accepted: a tinker:// path, or base_model")
        self.check_base_model(base_model)
        sampler = Sampler(sampler_id, base_model, body.model_path, snapshot)
        return self.session(body.session_id).samplers.setdefault(sampler_id, sampler)

    def sample(self, body: schemas.Sample, max_total: int) -> Promise:
        """Continue a prompt; a retry meets the promise of the first request. max_total: tokens, prompt and completion.

        Raises InputError, and QueueFullError while there are too many.
        """
        sampler = self.sampler(body.sampling_session_id)
        key = (sampler.sampler_id, -1 if body.seq_id is None else body.seq_id)
        promise = None if body.seq_id is None else self.promises.retried(key, "asample")
        if promise is not None:
            return promise
        for name in ("target_prompt_logprobs", "prompt_alt_tokens_k"):
            require(not getattr(body, name), name, getattr(body, name), "nothing: it is not supported")
        tokens = self.worker.engine.inputs.token_ids(prompt_tokens(body.prompt.chunks), "prompt")
        last = body.prompt_logprobs_last_n
        require(last is None or last < len(tokens), "prompt_logprobs_last_n", last, f"at most {len(tokens) - 1}")
        params = sampling_params(body, max(1, max_total - len(tokens)))
        require(params.n <= self.worker.max_queue, "num_samples", params.n, f"at most {self.worker.max_queue}")
        if self.worker.num_open("sampling") + params.n > self.worker.max_queue:
            raise QueueFullError("the queue is full")
        promise = self.promises.add(key, "asample")
        promise.fields["sample_sequence_ids"] = [f"{promise.request_id}-{i}" for i in range(params.n)]
        self._spawn(self._sample(promise, sampler, SampleRequest(tokens, params), body))
        return promise

    async def _sample(self, promise: Promise, sampler: Sampler, request: SampleRequest, body: schemas.Sample) -> None:
        self._running[promise.request_id] = sampler, request
        try:
            if sampler.snapshot is not None:
                request.adapter = await self.snapshots.use(sampler.snapshot)
            if promise.result.done():  # it was cancelled, or its session ended, before the worker had it
                return
            self.worker.sample([request], bounded=False)
            promise.settle(await sample(request, body))
        except Exception as error:
            promise.settle(error)
        finally:
            del self._running[promise.request_id]

    def cancel(self, request_id: str) -> None:
        """End a sampling request that is not done; of others, that have no result yet, nothing is undone."""
        promise = self.promises.get(request_id)
        if request_id in self._running:
            promise.settle(CancelledError("cancelled"))
            self.worker.cancel(self._running[request_id][1])
