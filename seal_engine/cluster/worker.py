"""A worker: one engine, which does the batches that a driver hands it. Nothing here knows how they arrive."""

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import seal_engine
from seal_engine.cluster.wire import AdapterState, pack, unpack
from seal_engine.engine import Engine
from seal_engine.loop.inner import InnerLoop, TrialResult
from seal_engine.model.devices import is_memory_error, total_memory
from seal_engine.model.fingerprint import fingerprint
from seal_engine.sampling.requests import RequestOutput
from seal_engine.training.jobs import TrainResult


@dataclass(frozen=True)
class WorkerConfig:
    """What engine a worker has. Fields are arguments of Engine.from_pretrained."""

    path: Path
    device: str
    dtype: str | torch.dtype
    deterministic: bool
    quantize: str | None
    pack_weights: bool
    threads: int


@dataclass(frozen=True)
class Identity:
    """What a worker says of itself when it has started."""

    host: str
    pid: int
    device: str
    threads: int
    memory: int  # bytes of the device
    version: str  # of seal_engine
    base: dict[str, str]  # digests of the checkpoint's files

    def mismatch(self, version: str, base: dict[str, str]) -> str | None:
        """How the worker differs from the driver, in what decides numbers; None: it does not."""
        if self.version != version:
            return f"seal_engine: found {self.version}; accepted: {version}, as the driver has"
        different = sorted(name for name in base.keys() | self.base.keys() if base.get(name) != self.base.get(name))
        return f"base: found another {', '.join(different)}; accepted: the driver's files" if different else None


@dataclass(frozen=True)
class Policy:
    """Which updates are merged into the base: all since its weights were read for the last time."""

    reloads: int = 0  # how often they were read again
    updates: tuple[Any, ...] = ()  # references to AdapterStates, which `Worker.fetch` follows


@dataclass(frozen=True)
class Call:
    """What is done with the items of a batch. verb: a method of Worker; options: its keyword arguments."""

    verb: str
    policy: Policy
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What became of a batch: results, or an error; memory: it is one of too little memory."""

    data: bytes = b""  # results, packed
    adapters: tuple[AdapterState, ...] = ()  # in the results
    seconds: float = 0.0
    lines: tuple[str, ...] = ()  # for the driver's log
    error: Exception | None = None
    memory: bool = False


class Worker:
    """Holds an engine. The engine is loaded by `hello`, so that a mistake arrives as an error."""

    def __init__(self, config: WorkerConfig, fetch: Callable[[Any], AdapterState] = lambda reference: reference):
        """fetch: follows a reference of a Policy."""
        self.config, self.fetch = config, fetch
        self.engine: Engine | None = None
        self.reloads, self.merged = 0, 0  # which policy the engine's weights are

    def hello(self) -> Identity:
        """Load the engine, if that has not been done, and say what it is. InputError as of Engine.from_pretrained."""
        c = self.config
        if self.engine is None:
            torch.set_num_threads(c.threads)
            self.engine = Engine.from_pretrained(c.path, c.device, c.dtype, c.deterministic, c.quantize, c.pack_weights)
        device = self.engine.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        parts = socket.gethostname(), os.getpid(), name, torch.get_num_threads(), total_memory(device)
        return Identity(*parts, seal_engine.__version__, fingerprint(c.path))

    def beat(self) -> None:
        """Answers while the process is alive, whatever its engine does."""

    def work(self, call: Call, data: bytes, *states: AdapterState) -> Reply:
        """Do a batch. data: its items, packed; states: the adapters in them."""
        start, lines = perf_counter(), []
        try:
            self.hello()
            assert self.engine is not None
            torch.set_num_threads(self.config.threads)
            self._adopt(self.engine, call.policy)
            adapters = [state.load(self.engine.config, self.engine.model.device) for state in states]
            results = getattr(self, call.verb)(unpack(data, adapters), lines.append, **call.options)
            packed, found = pack(results)
            return Reply(packed, tuple(map(AdapterState.of, found)), perf_counter() - start, tuple(lines))
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # the traceback itself does not travel
            return Reply(error=error, seconds=perf_counter() - start, memory=is_memory_error(error))
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _adopt(self, engine: Engine, policy: Policy) -> None:
        """Bring the weights to the policy: merge the updates that they lack."""
        if (policy.reloads, len(policy.updates)) < (self.reloads, self.merged) or policy.reloads != self.reloads:
            engine.reload()
            self.reloads, self.merged = policy.reloads, 0
        for reference in policy.updates[self.merged :]:
            engine.merge(self.fetch(reference).load(engine.config, engine.model.device))
            self.merged += 1

    def attempt(
        self, groups: Sequence[Sequence[Any]], log: Callable[[str], None], **options: Any
    ) -> list[list[TrialResult]]:
        """InnerLoop.attempt on groups of (candidate, seed). options: answer_params."""
        assert self.engine is not None
        loop = InnerLoop(self.engine, grade=lambda answered: [], log=log, progress=False, **options)
        results = iter(loop.attempt([candidate for group in groups for candidate in group]))
        return [[next(results) for _ in group] for group in groups]

    def train(self, jobs: Sequence[Any], log: Callable[[str], None], **options: Any) -> list[TrainResult]:
        """Engine.train."""
        assert self.engine is not None
        return self.engine.train(jobs, progress=False, **options)

    def generate(self, asked: Sequence[Any], log: Callable[[str], None], **options: Any) -> list[RequestOutput]:
        """Engine.generate for each (prompt, parameters, adapter)."""
        assert self.engine is not None
        prompts, params, adapters = map(list, zip(*asked, strict=True))
        return self.engine.generate(prompts, params, adapters, progress=False, **options)
