"""Pool: an engine whose training and sampling are done by workers, each with an engine of its own."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, count
from typing import Any, Self

from seal_engine.cluster.dispatch import Dispatcher
from seal_engine.cluster.shares import WorkerShare
from seal_engine.cluster.worker import Call, Policy, WorkerConfig
from seal_engine.engine import Engine
from seal_engine.inputs import broadcast
from seal_engine.loop.domain import Candidate
from seal_engine.loop.inner import Grade, InnerLoop, TrialResult, job_key
from seal_engine.model.adapters import Adapter
from seal_engine.model.devices import free_memory
from seal_engine.model.fingerprint import fingerprint
from seal_engine.progress import reporting, write_line
from seal_engine.sampling.requests import RequestOutput, SamplingParams
from seal_engine.training.jobs import TrainJob, TrainResult, TrainSequence
from seal_engine.types import InputError, is_integer, require

PLAN_TOKENS = 256  # of a sequence, where `plan` says how many adapters a worker's memory holds
TEXT_TOKENS = 3  # characters of a text for each token, about, where only relative costs count
BACKWARD = 2  # what a token costs in training beside its forward pass


class Pool(Engine):
    """An engine over many: `train`, `generate` and the inner loop's trials are done by workers that hold the same base.

    All else (tokenizer, merges, scores) is done in this process, by the engine that it was built from. Results depend
    on jobs, seeds and merged updates alone: neither on which worker they come from, nor on whether one died meanwhile.
    Use it as a context: workers start when there is work, and end with the context.
    """

    def __init__(
        self,
        engine: Engine,
        workers: int = 0,
        ray_address: str = "",
        device: str = "auto",
        quantize: str | None = None,
        log: Callable[[str], None] = write_line,
    ):
        """engine: may be on a CPU, whatever workers have. workers: how many; 0, with an address: one for each GPU there
        or, without any, for each machine. ray_address: "" starts a Ray for this process; or "auto", or HOST:PORT.
        device: "auto" (a GPU each if Ray has any), "cpu" or "cuda". quantize: as in from_pretrained.

        InputError where Ray is missing, or for an engine that no worker could load again.
        """
        require(is_integer(workers) and workers >= 0, "workers", workers, "an integer >= 0")
        require(workers > 0 or bool(ray_address), "workers", workers, "at least 1, or a ray_address")
        require(device in ("auto", "cpu", "cuda"), "device", device, "'auto', 'cpu' or 'cuda' with workers")
        if find_spec("ray") is None:
            raise InputError("workers: found no Ray; accepted: an environment with it: pip install 'seal-engine[ray]'")
        if engine.directory is None:
            raise InputError("engine: found one without a directory; accepted: one that workers can load, too")
        super().__init__(engine.model, engine.directory, deterministic=engine.model.batch_invariant)
        self._wanted, self._address, self._device, self._quantize = workers, ray_address, device, quantize
        self._log = log
        self._policy = Policy()
        self._sampling_seeds = count()  # of samples without one, so that it does not matter who draws them
        self._close: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the Ray that was started for them. The pool cannot be used afterwards."""
        while self._close:
            self._close.pop()()

    @cached_property
    def _transport(self) -> Any:
        """Workers that start; see RayTransport."""
        from seal_engine.cluster.ray_transport import RayTransport, connect

        placement, leave = connect(self._address, self._wanted, self._device)
        self._close.append(leave)
        pack = self.model.packed_bytes <= free_memory(self.model.device) // 4 // placement.workers
        device, deterministic = "cuda" if placement.gpus else "cpu", self.model.batch_invariant
        assert self.directory is not None
        parts = self.directory.resolve(), device, self.model.dtype, deterministic, self._quantize, pack
        config = WorkerConfig(*parts, placement.threads)
        transport = RayTransport(config, placement, self.config, fingerprint(self.directory), self._log)
        self._close.append(transport.close)
        return transport

    @cached_property
    def _dispatcher(self) -> Dispatcher:
        """Over workers that are ready."""
        names = [f"worker {i}" for i in range(self._transport.num_workers)]
        dispatcher = Dispatcher(self._transport, names, self._log)
        dispatcher.wait_until_ready()
        return dispatcher

    def inner_loop(
        self, answer_params: SamplingParams, grade: Grade, log: Callable[[str], None] = print, progress: bool = True
    ) -> InnerLoop:
        """An InnerLoop whose trials are trained and asked by workers, and graded here. Parameters: as of InnerLoop."""
        return _PoolLoop(self, answer_params, grade, log, progress)

    def train(
        self,
        jobs: Sequence[TrainJob],
        callback: Callable[[int, int, float], None] | None = None,
        progress: bool = True,
        **options: Any,
    ) -> list[TrainResult]:
        """Engine.train on the workers; adapters come back. Jobs write no checkpoints: a machine may be another one."""
        require(callback is None, "callback", callback, "None: workers report no single steps")
        own = [replace(job, checkpoint_dir=None) for job in jobs]
        return self._run("train", own, list(map(_job_cost, own)), "job", progress, own, **options)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[Adapter | None] | Adapter | None = None,
        progress: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Engine.generate on the workers."""
        params = SamplingParams() if params is None else params
        wanted = broadcast(params, len(prompts), SamplingParams, "params", "a SamplingParams")
        wanted = [own if own.seed is not None else replace(own, seed=next(self._sampling_seeds)) for own in wanted]
        owners = broadcast(adapters, len(prompts), Adapter | None, "adapters", "an Adapter or None")
        items = list(zip(prompts, wanted, owners, strict=True))
        # All cost the same, so that they stay in order: those with one prompt or adapter in a batch.
        return self._run("generate", items, [1.0] * len(items), "prompt", progress, **options)

    def attempt(
        self, candidates: Sequence[tuple[Candidate, int]], answer_params: SamplingParams, progress: bool = True
    ) -> list[TrialResult]:
        """InnerLoop.attempt on the workers. Adapters stay there: `train` with the job and its seed gives one again."""
        groups: dict[Any, list[int]] = {}
        for i, (candidate, seed) in enumerate(candidates):
            key = i if candidate.job is None else (job_key(candidate.job), seed)
            groups.setdefault(key, []).append(i)  # equal jobs are trained once, by whoever gets them
        items = [[candidates[i] for i in group] for group in groups.values()]
        costs = [_group_cost(item, answer_params.max_tokens or 0) for item in items]
        jobs = [candidate.job for candidate, _ in candidates if candidate.job is not None]
        results = self._run("attempt", items, costs, "adapter", progress, jobs, answer_params=answer_params)
        order, trials = chain.from_iterable(groups.values()), chain.from_iterable(results)
        by_number = dict(zip(order, trials, strict=True))
        return [by_number[i] for i in range(len(candidates))]

    def merge(self, adapter: Adapter) -> None:
        """Engine.merge, here and on the workers before their next batch."""
        super().merge(adapter)
        reference = self._transport.share(adapter)
        self._policy = Policy(self._policy.reloads, (*self._policy.updates, reference))

    def reload(self) -> None:
        """Engine.reload, here and on the workers before their next batch."""
        super().reload()
        self._policy = Policy(self._policy.reloads + 1)

    def shares(self) -> list[WorkerShare]:
        """What every worker has done so far."""
        if "_dispatcher" not in self.__dict__:
            return []
        total = self._dispatcher.seconds
        return [
            WorkerShare(w.name, w.items, w.batches_done, w.busy_seconds, max(0.0, total - w.busy_seconds), w.restarts)
            for w in self._dispatcher.workers
        ]

    def traffic(self) -> dict[str, int]:
        """Messages and bytes that went between this process and the workers."""
        return asdict(self._transport.traffic)

    def _run(
        self,
        verb: str,
        items: Sequence[Any],
        costs: Sequence[float],
        unit: str,
        progress: bool,
        jobs: Sequence[TrainJob] = (),
        **options: Any,
    ) -> list[Any]:
        """Have workers do items. jobs: what is trained in it."""
        if not items:
            return []
        dispatcher, call = self._dispatcher, Call(verb, self._policy, options)
        with reporting(len(items), unit, f"{len(dispatcher.workers)} workers", progress) as report:
            kind = f"{verb} with training" if jobs else verb
            return dispatcher.run(call, items, costs, self._limits(jobs), report, kind)

    def _limits(self, jobs: Sequence[TrainJob]) -> dict[int, int]:
        """How many adapters each worker's memory holds at once, by `plan`: the most jobs in one batch."""
        loras = {repr(lora): lora for lora in (job.init_from.config if job.init_from else job.lora for job in jobs)}
        identities, limits = self._transport.identities, {}
        hosts = Counter(identity.host for identity in identities.values() if identity.device == "cpu")
        for worker, identity in identities.items():
            cpu = identity.device == "cpu"
            memory = identity.memory // (hosts[identity.host] if cpu else 1)
            for lora in loras.values():
                with suppress(InputError):  # a job that no worker can train fails there, with its own error
                    adapters = self.plan(lora, PLAN_TOKENS, memory, cpu=cpu).adapters
                    limits[worker] = min(adapters, limits.get(worker, adapters))
        return limits


class _PoolLoop(InnerLoop):
    """Trains and asks on a pool's workers in one go, so that adapters need not travel."""

    engine: Pool

    def attempt(self, candidates: Sequence[tuple[Candidate, int]]) -> list[TrialResult]:
        return self.engine.attempt(candidates, self.answer_params, self.progress)


def _job_cost(job: TrainJob) -> float:
    """About how many tokens go through the model in training, a backward pass counted as BACKWARD forward passes."""
    return (1 + BACKWARD) * job.num_epochs * sum(map(_num_tokens, job.sequences))


def _group_cost(group: Sequence[tuple[Candidate, int]], answer_tokens: int) -> float:
    """The same for candidates that share a job, with their questions."""
    job = group[0][0].job
    prompts = [prompt for candidate, _ in group for prompt in candidate.questions]
    return sum(answer_tokens + _num_tokens(prompt) for prompt in prompts) + (0 if job is None else _job_cost(job))


def _num_tokens(sequence: Any) -> float:
    """About how long a prompt or a training sequence is."""
    sequence = sequence.token_ids if isinstance(sequence, TrainSequence) else sequence
    if isinstance(sequence, str):
        return len(sequence) / TEXT_TOKENS
    is_chat = len(sequence) > 0 and isinstance(sequence[0], Mapping)
    return sum(len(str(turn)) / TEXT_TOKENS for turn in sequence) if is_chat else len(sequence)
