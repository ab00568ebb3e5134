"""An engine's `train` and `generate` for threads other than its own: they wait for the worker, which serves others in
the same passes and steps meanwhile."""

from collections.abc import Sequence
from time import perf_counter

from seal_engine.engine import Engine
from seal_engine.model.adapters import Adapter
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.sampling.requests import RequestOutput, SamplingParams
from seal_engine.serve.requests import SampleRequest
from seal_engine.serve.worker import Worker
from seal_engine.training.jobs import TrainJob, TrainResult


class WorkerBackend:
    """A Backend of the inner loop. It bounds nothing: whoever uses it bounds how many requests there are at once."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.results: list[TrainResult] = []  # of all calls of `train`
        self.state = "waiting"
        self.training_seconds = 0.0  # of the last call of `train`

    @property
    def engine(self) -> Engine:
        """The engine, for what needs no turn of the worker."""
        return self.worker.engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The engine's tokenizer."""
        return self.engine.tokenizer

    def train(self, jobs: Sequence[TrainJob], *, progress: bool = True) -> list[TrainResult]:
        """Train jobs beside everyone else's. Raises ClosedError if the server ends before they do."""
        self.state, start = "training", perf_counter()
        requests = self.worker.train(jobs, bounded=False)
        try:
            results = [request.future.result() for request in requests]
        finally:
            for request in requests:
                self.worker.cancel(request)
        self.results += results
        self.training_seconds = perf_counter() - start
        return results

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        adapters: Sequence[Adapter | None] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts beside everyone else's, at the latest after as long as training took: others then join.

        InputError for the first that cannot be run, by its number.
        """
        self.state = "sampling"
        owners = [None] * len(prompts) if adapters is None else adapters
        ids = [self.engine.inputs.token_ids(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        requests = [
            SampleRequest(own, params, owner, patience=self.training_seconds)
            for own, owner in zip(ids, owners, strict=True)
        ]
        self.worker.sample(requests, bounded=False)
        try:
            return [request.future.result() for request in requests]
        finally:
            for request in requests:
                self.worker.cancel(request)
