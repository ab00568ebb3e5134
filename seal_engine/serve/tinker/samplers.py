"""Samplers: one version of a model, or the base, that prompts are continued with.

A sampler's adapter never changes: it is a copy. Clients make one after every few steps and never say that they are done
with it, so the copies that were used last stay in memory, up to a number of bytes, and the others lie on the disk until
they are asked again.
"""

import asyncio
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seal_engine.model.adapters import Adapter
from seal_engine.sampling.requests import Completion, RequestOutput, SamplingParams
from seal_engine.serve.requests import FailedError, SampleRequest
from seal_engine.serve.tinker.messages import DTYPES, STOP_REASONS, new_message
from seal_engine.serve.tinker.promises import Reply
from seal_engine.serve.worker import Worker
from seal_engine.types import InputError

FLOAT32, INT32 = DTYPES[1], DTYPES[3]
NO_LOGPROB = -99999.0  # of the SDK: a place of a table of most likely tokens that holds none


class Snapshot:
    """An adapter that does not change, in memory or on the disk."""

    def __init__(self, adapter: Adapter):
        self.adapter: Adapter | None = adapter
        self.nbytes = adapter.nbytes
        self.directory: Path | None = None  # a copy on the disk
        self.dropped = False  # no sampler has it any more


class Snapshots:
    """The adapters of samplers, those used last in memory."""

    def __init__(self, worker: Worker, max_bytes: int):
        self.worker = worker
        self.max_bytes = max_bytes
        self._resident: OrderedDict[int, Snapshot] = OrderedDict()  # by id(), the one used last at the end
        self._by_adapter: dict[int, Snapshot] = {}  # by uid
        self._lock = asyncio.Lock()  # of moves between memory and disk

    @property
    def nbytes(self) -> int:
        """Bytes of those in memory."""
        return sum(snapshot.nbytes for snapshot in self._resident.values())

    async def add(self, adapter: Adapter) -> Snapshot:
        """The snapshot of an adapter, the same for the same one."""
        snapshot = self._by_adapter.get(adapter.uid)
        if snapshot is None or snapshot.adapter is not adapter:
            snapshot = self._by_adapter[adapter.uid] = Snapshot(adapter)
        await self.use(snapshot)
        return snapshot

    async def use(self, snapshot: Snapshot) -> Adapter:
        """The adapter of a snapshot, read from the disk if it lies there; others make room for it."""
        async with self._lock:
            adapter = snapshot.adapter
            if adapter is None:
                assert snapshot.directory is not None
                directory = snapshot.directory
                adapter = await asyncio.wrap_future(self.worker.call(lambda engine: engine.load_adapter(directory)))
                snapshot.adapter = adapter
            if snapshot.dropped:  # while it was read
                return adapter
            self._resident[id(snapshot)] = snapshot
            self._resident.move_to_end(id(snapshot))
            while self.nbytes > self.max_bytes and len(self._resident) > 1:
                _, oldest = self._resident.popitem(last=False)
                await self._page_out(oldest)
            return adapter

    async def _page_out(self, snapshot: Snapshot) -> None:
        adapter = snapshot.adapter
        assert adapter is not None
        if snapshot.directory is None:
            directory = Path(tempfile.mkdtemp(prefix="seal-engine-sampler-"))
            await asyncio.to_thread(adapter.save, directory)
            snapshot.directory = directory
            if snapshot.dropped:  # while it was written
                shutil.rmtree(directory, ignore_errors=True)
        self._by_adapter.pop(adapter.uid, None)
        snapshot.adapter = None

    def drop(self, snapshots: Sequence[Snapshot]) -> None:
        """Forget snapshots that no sampler has any more."""
        for snapshot in snapshots:
            snapshot.dropped = True
            self._resident.pop(id(snapshot), None)
            if snapshot.adapter is not None:
                self._by_adapter.pop(snapshot.adapter.uid, None)
            if snapshot.directory is not None:
                shutil.rmtree(snapshot.directory, ignore_errors=True)


@dataclass(eq=False)
class Sampler:
    """What a client samples from. snapshot None: the base."""

    sampler_id: str
    base_model: str
    model_path: str | None
    snapshot: Snapshot | None
    clients: int = 1  # that share it


def prompt_tokens(chunks: Sequence[Any]) -> list[int]:
    """The token ids of a prompt. InputError for chunks that are no text."""
    tokens: list[int] = []
    for i, chunk in enumerate(chunks):
        if chunk.type != "encoded_text" or chunk.tokens is None:
            found = f"a chunk of type {chunk.type!r:.80}"
            raise InputError(f"prompt.chunks[{i}]: found {found}; accepted: encoded_text with tokens")
        tokens += chunk.tokens
    return tokens


def sampling_params(body: Any, max_tokens: int) -> SamplingParams:
    """SamplingParams of an asample body. max_tokens: where the client sets none. InputError naming the field."""
    asked = body.sampling_params
    stop = asked.stop
    of_ids = isinstance(stop, list) and all(isinstance(item, int) for item in stop)
    prompt_logprobs: bool | int = bool(body.prompt_logprobs) or body.prompt_logprobs_last_n is not None
    if body.topk_prompt_logprobs:
        prompt_logprobs = body.topk_prompt_logprobs
    return SamplingParams(
        n=body.num_samples,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        max_tokens=max_tokens if asked.max_tokens is None else asked.max_tokens,
        stop=None if of_ids else stop,
        stop_token_ids=stop if of_ids else None,
        seed=asked.seed,
        logprobs=body.topk_sample_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


async def sample(request: SampleRequest, body: Any) -> Reply:
    """The SampleResponse of a request that the worker has."""
    output = await asyncio.wrap_future(request.future)
    return Reply(await asyncio.to_thread(write_response, output, body), "application/x-protobuf")


def write_response(output: RequestOutput, body: Any) -> bytes:
    """A SampleResponse: sequences and, if asked for, the prompt's log-probabilities, NaN where there is none."""
    response = new_message("SampleResponse")
    for completion in output.outputs:
        _write_sequence(response.sequences.add(), completion, body.topk_sample_logprobs)
    length = len(output.prompt_token_ids)
    first = 1 if body.prompt_logprobs_last_n is None else length - body.prompt_logprobs_last_n
    if body.prompt_logprobs and output.prompt_logprobs is not None:
        logprobs = np.array([np.nan, *output.prompt_logprobs], FLOAT32)
        logprobs[:first] = np.nan
        response.prompt_logprobs = logprobs.tobytes()
    if body.topk_prompt_logprobs and output.prompt_top_logprobs is not None:
        tables = [{}, *output.prompt_top_logprobs]
        tables[:first] = [{}] * first
        _write_top(response.topk_prompt_logprobs, tables, body.topk_prompt_logprobs)
    return response.SerializeToString()


def _write_sequence(message: Any, completion: Completion, top: int) -> None:
    if completion.finish_reason not in STOP_REASONS:
        raise FailedError(f"a sample ended as {completion.finish_reason}")
    message.stop_reason = STOP_REASONS[completion.finish_reason]
    message.tokens = np.array(completion.token_ids, INT32).tobytes()
    message.logprobs = np.array(completion.logprobs, FLOAT32).tobytes()
    if top and completion.top_logprobs is not None:
        _write_top(message.topk_sampled_logprobs, completion.top_logprobs, top)


def _write_top(message: Any, tables: Sequence[dict[int, float]], k: int) -> None:
    """The k most likely tokens of each place, as matrices [places, k]."""
    ids, logprobs = np.zeros((len(tables), k), INT32), np.full((len(tables), k), NO_LOGPROB, FLOAT32)
    for i, table in enumerate(tables):
        best = sorted(table.items(), key=lambda item: -item[1])[:k]
        ids[i, : len(best)] = [token for token, _ in best]
        logprobs[i, : len(best)] = [logprob for _, logprob in best]
    message.token_ids, message.logprobs, message.k, message.length = ids.tobytes(), logprobs.tobytes(), k, len(tables)
