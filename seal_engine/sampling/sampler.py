"""Sampling: requests are continued token by token, many at once, with any mix of adapters, over a paged K/V cache.

A request's samples are rows. A step takes the next tokens of as many rows as fit the token budget: one of each row that
is being continued, then chunks of prompts. Rows of one adapter lie together, so each adapter is read once. A row's
tokens depend on its own prompt, adapter and seed alone.

Rows hold blocks of the cache (kv_cache.py). The samples of a request share their prompt's blocks and copy the last one
when they write to it; other requests find a common beginning by the index, under the adapter's (uid, version). When
blocks run out, the youngest row gives its own back and is computed again later.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seal_engine.inputs import check_token_ids, integers
from seal_engine.model.adapters import Adapter
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.sampling.decode_graph import DecodeGraphs
from seal_engine.sampling.detokenizer import Decode, Detokenizer
from seal_engine.sampling.kv_cache import KVCache, OutOfBlocks
from seal_engine.sampling.requests import Completion, Delta, RequestOutput, SamplingParams
from seal_engine.types import InputError, PagedBatch, is_integer
from seal_kernels.sampling import sample_tokens


class _Request:
    """A request and its rows."""

    def __init__(self, request_id: int, output: RequestOutput, params: SamplingParams, adapter: Adapter | None):
        self.request_id = request_id
        self.output = output
        self.params = params
        self.adapter = adapter
        self.stop_ids: frozenset[int] = frozenset()
        self.most_tokens = 0  # prompt and completion together
        self.seed = 0
        self.rows: list[_Row] = []
        self.open = 0  # rows that are not done
        self.forked = False


class _Row:
    """One sample of a request."""

    def __init__(self, request: _Request, index: int, detokenizer: Detokenizer | None):
        self.request = request
        self.completion = Completion(index)
        if request.params.logprobs is not None:
            self.completion.logprobs = []
            self.completion.top_logprobs = [] if request.params.logprobs else None
        self.tokens = list(request.output.prompt_token_ids)
        self.table: list[int] = []  # blocks; empty while it waits
        self.computed = 0  # tokens whose K/V are in them
        self.root: tuple[int, ...] = ()  # whose K/V these are
        self.detokenizer = detokenizer
        self.done = False
        self.sent = 0  # characters of the text that have been handed out
        generator = np.random.SeedSequence(request.seed, spawn_key=(index,))
        self.seed = int(generator.generate_state(1, np.uint64)[0] >> np.uint64(1))

    @property
    def todo(self) -> int:
        """Tokens to compute before the next one can be drawn: at least one."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> list[int]:
        return self.completion.token_ids


class Sampler:
    """`add_request`, then `step` until `poll` gives the output; `cancel` at any time."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        decode: Decode | None,
        stop_token_ids: Sequence[int],
        token_budget: int,
        seeds: Iterator[int],
        max_rows: int = 256,
        stream: bool = False,
    ):
        """decode: token ids to text; None: completions have no text. stop_token_ids: the model's own. token_budget:
        tokens a step. seeds: for requests without one. max_rows: rows that hold blocks at once. stream: deltas carry
        text.
        """
        self.model = model
        self.cache = cache
        self.decode = decode
        self.stop_token_ids = stop_token_ids
        self.token_budget = token_budget
        self.seeds = seeds
        self.max_rows = max_rows
        self.stream = stream
        self.tokens_done = 0  # sampled
        self.tokens_computed = 0
        self.num_done = 0  # requests
        self.graphs = DecodeGraphs(model) if model.device.type == "cuda" else None
        self._requests: dict[int, _Request] = {}
        self._submitted = 0
        self._waiting: deque[_Row] = deque()
        self._running: dict[_Row, None] = {}  # the oldest first
        self._lora: tuple[Any, LoraBatch | None] = ((), None)  # of the last step: the next often has the same rows

    def add_request(
        self,
        prompt: str | None,
        token_ids: Sequence[int] | InputError,
        params: SamplingParams,
        adapter: Adapter | None = None,
    ) -> int:
        """Queue a prompt; returns the request's id. One that cannot be run fails alone: its output has an error.

        prompt: the text that token_ids were made from, for the output alone. token_ids: or why there are none.
        """
        request = _Request(self._submitted, RequestOutput(prompt, [], []), params, adapter)
        self._requests[request.request_id], self._submitted = request, self._submitted + 1
        try:
            if isinstance(token_ids, InputError):
                raise token_ids
            request.output.prompt_token_ids = integers(token_ids, "prompt")
            self._prepare(request)
        except InputError as error:
            request.output.error = str(error)
            self.num_done += 1
            return request.request_id
        request.open = params.n
        request.output.prompt_logprobs = [] if params.prompt_logprobs else None
        for index in range(params.n):
            watched = self.decode is not None and (params.stops or self.stream)
            detokenizer = Detokenizer(self.decode, params.stops) if self.decode and watched else None
            request.rows.append(_Row(request, index, detokenizer))
        request.output.outputs = [row.completion for row in request.rows]
        self._waiting.append(request.rows[0])  # the others are let in when its prompt has been computed
        return request.request_id

    def _prepare(self, request: _Request) -> None:
        """Check a request against model and cache. Raises InputError."""
        config, params, ids = self.model.config, request.params, request.output.prompt_token_ids
        check_token_ids(ids, "prompt", config)
        if request.adapter is not None:
            request.adapter.check_model(config, "adapter")
        if params.stops and self.decode is None:
            raise InputError("stop: found texts, but there is no tokenizer; accepted: stop_token_ids")
        longest = config.max_position_embeddings
        if len(ids) >= longest:
            raise InputError(f"prompt: found {len(ids)} tokens; accepted: fewer than {longest}, the model's length")
        request.most_tokens = longest if params.max_tokens is None else min(longest, len(ids) + params.max_tokens)
        pool = self.cache.pool
        room = pool.num_blocks * pool.block_size + 1  # the last token is drawn, but never computed
        if request.most_tokens > room:
            found = f"{request.most_tokens} tokens, prompt and completion"
            raise InputError(f"max_tokens: found {found}; accepted: at most {room}, which the K/V cache holds")
        own = () if params.ignore_eos else self.stop_token_ids
        request.stop_ids = frozenset((*own, *(params.stop_token_ids or ())))
        request.seed = next(self.seeds) if params.seed is None else params.seed

    @property
    def busy(self) -> bool:
        """True while a request is not done."""
        return bool(self._waiting or self._running)

    @property
    def num_resident(self) -> int:
        """Completions that are being worked on."""
        return len(self._running)

    def poll(self, request_id: int) -> RequestOutput | None:
        """The request's output, or None while it is not done. Raises InputError for an id that was never given out."""
        request = self._request(request_id)
        return None if request.open else request.output

    def output(self, request_id: int) -> RequestOutput:
        """The request's output as it is now."""
        return self._request(request_id).output

    def _request(self, request_id: int) -> _Request:
        if not is_integer(request_id) or request_id not in self._requests:
            raise InputError(f"request_id: found {request_id!r}; accepted: an id that add_request returned")
        return self._requests[request_id]

    def forget(self, request_id: int) -> None:
        """Cancel a request if it is not done, and drop its output: for samplers that live long."""
        self.cancel(request_id)
        self.num_done -= 1
        del self._requests[request_id]

    def cancel(self, request_id: int) -> None:
        """Stop a request: its unfinished samples end with "cancelled". One that is done stays done."""
        self._end(self._request(request_id), "cancelled")

    def _end(self, request: _Request, reason: str | None) -> None:
        """End all of a request's samples that are not done."""
        for row in request.rows:
            if not row.done:
                self._finish(row, reason)

    def check_integrity(self) -> None:
        """RuntimeError if the cache's blocks are not exactly those that rows hold."""
        self.cache.pool.check_integrity([row.table for request in self._requests.values() for row in request.rows])

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """One pass of the model: the next tokens of as many rows as fit the budget. Returns what was drawn."""
        for row in [row for row in reversed(self._running) if row.root != self._root(row)]:
            self._preempt(row)  # its adapter or the base has been trained since: its K/V are of another model
        for row in self._running:
            row.computed -= not row.todo  # a step was interrupted before its token was drawn
        self._admit()
        chunks, copies = self._schedule()
        if not chunks:
            return []
        self.cache.copy(copies)
        chunks.sort(key=lambda chunk: 0 if chunk[0].request.adapter is None else chunk[0].request.adapter.uid)
        decoding = self.graphs is not None and all(count == 1 for _, count in chunks)
        forward = self.graphs.hidden_states if self.graphs and decoding else self.model.hidden_states
        hidden = forward(self._batch(chunks), self._lora_batch(chunks))
        self.tokens_computed += len(hidden)
        drawing: list[tuple[int, _Row]] = []  # (row of `hidden`, whose next token it decides)
        end = 0
        for row, count in chunks:
            end += count
            if row.request.params.prompt_logprobs:
                self._score_prompt(row, hidden[end - count : end])
            row.computed += count
            self.cache.pool.index(row.root, row.tokens, row.table, row.computed)
            if not row.todo:
                drawing.append((end - 1, row))
                drawing += [(end - 1, sibling) for sibling in self._fork(row)]
        return self._draw(hidden, drawing) if drawing else []

    def _root(self, row: _Row) -> tuple[int, ...]:
        adapter = row.request.adapter
        return (self.model.version,) if adapter is None else (self.model.version, adapter.uid, adapter.version)

    def _admit(self) -> None:
        """Let waiting rows in: as many as can be worked on in this step, and have blocks for what they have so far.

        A row whose next block is just being computed for another row waits for it: equal prompts are computed once.
        """
        pool = self.cache.pool
        budget = self.token_budget - sum(row.todo for row in self._running)
        coming = {self._next_block(row.root, row.tokens, row.computed) for row in self._running if row.todo > 1}
        held: list[_Row] = []
        while self._waiting and len(self._running) < self.max_rows and (budget > 0 or not self._running):
            row = self._waiting[0]
            # Rows grow: one that was let in with no room beside it would soon be preempted again.
            root, reading = self._root(row), row.request.params.prompt_logprobs and not row.new_tokens
            reading = reading and row.completion.index == 0
            table = [] if reading else pool.match(root, row.tokens)
            # The last token is left out, as it is always computed.
            if not reading and self._next_block(root, row.tokens[:-1], len(table) * pool.block_size) in coming:
                pool.free(table)
                held.append(self._waiting.popleft())
                continue
            needed = -(-len(row.tokens) // pool.block_size) - len(table) + len(self._running) // 8
            if needed > pool.num_available and self._running:
                pool.free(table)
                break
            self._waiting.popleft()
            if reading and root != row.root:
                row.request.output.prompt_logprobs = []  # what there is was of another model
            row.root, row.table = root, table
            row.computed = len(row.table) * pool.block_size
            self._running[row] = None
            budget -= row.todo
            coming.add(self._next_block(root, row.tokens, row.computed))
        self._waiting.extendleft(reversed(held))

    def _next_block(self, root: tuple[int, ...], tokens: list[int], computed: int) -> Any:
        """A name for the first block that is not full yet: all tokens up to its end; without those, of its own."""
        end = (computed // self.cache.pool.block_size + 1) * self.cache.pool.block_size
        return (root, *tokens[:end]) if end <= len(tokens) else object()

    def _schedule(self) -> tuple[list[tuple[_Row, int]], list[tuple[int, int]]]:
        """(rows with the number of tokens to compute of each, blocks to copy before): continued rows come first."""
        budget, counts, copies = self.token_budget, {}, {}
        for row in sorted(self._running, key=lambda row: row.todo > 1):
            count = min(row.todo, budget)
            # A row before it may have preempted it meanwhile.
            if count and row in self._running and self._reserve(row, count, copies):
                counts[row] = count
                budget -= count
        chunks = [(row, count) for row, count in counts.items() if row in self._running]
        return chunks, [copies[row] for row, _ in chunks if row in copies]

    def _reserve(self, row: _Row, count: int, copies: dict[_Row, tuple[int, int]]) -> bool:
        """Make the row's next `count` places writable, by preempting the youngest; False if it was itself preempted."""
        pool = self.cache.pool
        while True:
            missing = -(-(row.computed + count) // pool.block_size) - len(row.table)
            new = pool.allocate(max(0, missing))
            if new is not None:
                row.table += new
                at = row.computed // pool.block_size
                try:
                    copied = pool.writable(row.table, at)
                except OutOfBlocks:
                    pass
                else:
                    if copied is not None:
                        copies[row] = copied
                    return True
            youngest = next(reversed(self._running))
            self._preempt(youngest)
            if youngest is row:
                return False

    def _preempt(self, row: _Row) -> None:
        """Take the row's blocks away; what it has so far will be computed again."""
        del self._running[row]
        self._release(row)
        self._waiting.appendleft(row)

    def _release(self, row: _Row) -> None:
        self.cache.pool.free(row.table)
        row.table, row.computed = [], 0

    def _fork(self, row: _Row) -> list[_Row]:
        """The request's other samples, when its prompt has just been computed: they share its blocks.

        Those beyond max_rows wait; they will find the prompt's full blocks by the index.
        """
        if row.completion.index or row.request.forked:
            return []
        row.request.forked = True
        siblings = [sibling for sibling in row.request.rows[1:] if not sibling.done]
        room = max(0, self.max_rows - len(self._running))
        for sibling in siblings[:room]:
            self.cache.pool.share(row.table)
            sibling.table, sibling.computed, sibling.root = list(row.table), row.computed, row.root
            self._running[sibling] = None
        self._waiting.extendleft(reversed(siblings[room:]))
        return siblings[:room]

    def _batch(self, chunks: list[tuple[_Row, int]]) -> PagedBatch:
        block_size = self.cache.pool.block_size
        counts = np.array([count for _, count in chunks])
        firsts = np.array([row.computed for row, _ in chunks])
        tables = np.zeros((len(chunks), max(len(row.table) for row, _ in chunks)), dtype=np.int32)
        for i, (row, _) in enumerate(chunks):
            tables[i, : len(row.table)] = row.table
        bounds = np.concatenate([[0], counts.cumsum()])
        owner = np.repeat(np.arange(len(chunks)), counts)
        positions = np.arange(bounds[-1]) - bounds[owner] + firsts[owner]
        slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        tokens = [token for row, count in chunks for token in row.tokens[row.computed : row.computed + count]]

        def put(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(self.model.device, non_blocking=True)

        return PagedBatch(
            token_ids=put(tokens, torch.int64),
            positions=put(positions, torch.int64),
            cu_seqlens=put(bounds, torch.int32),
            context_lens=put(firsts + counts, torch.int32),
            block_tables=put(tables, torch.int32),
            slots=put(slots, torch.int64),
            max_query=int(counts.max()),
            max_context=int((firsts + counts).max()),
            keys=self.cache.keys,
            values=self.cache.values,
        )

    def _lora_batch(self, chunks: list[tuple[_Row, int]]) -> LoraBatch | None:
        adapters, tokens = [], []
        for adapter, group in groupby(chunks, key=lambda chunk: chunk[0].request.adapter):
            adapters.append(adapter)
            tokens.append(sum(count for _, count in group))
        key = [(adapter, count) for adapter, count in zip(adapters, tokens, strict=True)]
        if key != self._lora[0]:
            self._lora = key, LoraBatch.make(adapters, tokens)
        return self._lora[1]

    def _score_prompt(self, row: _Row, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that the rows of `hidden`, from `computed` on, predict."""
        output = row.request.output
        prompt, scored = output.prompt_token_ids, output.prompt_logprobs or []
        first = len(scored)  # this token predicts the next one to be scored
        if row.completion.index == 0 and first < len(prompt) - 1:  # computed <= first: again, if it was preempted
            hidden = hidden[first - row.computed : len(prompt) - 1 - row.computed]
            targets = torch.tensor(prompt[first + 1 : first + 1 + len(hidden)], device=hidden.device)
            output.prompt_logprobs = scored + self.model.token_logprobs(hidden, targets.long()).tolist()

    def _draw(self, hidden: Tensor, drawing: list[tuple[int, _Row]]) -> list[Delta]:
        """Draw the next token of every row and take it in."""
        rows = [row for _, row in drawing]
        at = torch.tensor([i for i, _ in drawing], device=hidden.device)
        logits = self.model.logits(hidden.index_select(0, at))  # [N, V]
        raw, changed = logits, []
        for i, row in enumerate(rows):
            params = row.request.params
            early = len(row.new_tokens) < params.min_tokens and row.request.stop_ids
            if early or params.logits_hook:
                logits = logits.clone() if raw is logits else logits
                changed.append(i)
            if params.logits_hook:
                try:
                    logits[i] = params.logits_hook(list(row.new_tokens), logits[i].clone())
                except Exception as error:
                    row.request.output.error = f"logits_hook: {type(error).__name__}: {error}"
            if early:
                ids = [token for token in row.request.stop_ids if 0 <= token < logits.shape[1]]
                logits[i, ids] = float("-inf")
        options = [row.request.params for row in rows]

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=hidden.device)

        tokens, logprobs = sample_tokens(
            logits,
            column([p.temperature for p in options], torch.float32),
            column([min(p.top_k, logits.shape[1]) for p in options], torch.int32),
            column([p.top_p for p in options], torch.float32),
            column([row.seed for row in rows], torch.int64),
            column([len(row.new_tokens) for row in rows], torch.int64),
        )
        if changed:  # what is reported are the model's own
            logprobs[changed] = raw[changed].log_softmax(1).gather(1, tokens[changed, None].clamp_min(0)).squeeze(1)
        top = self._top_logprobs(raw, rows)
        deltas = []
        for i, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)):
            if row.done:
                continue  # its request has just failed through another of its rows
            if token < 0 and row.request.output.error is None:
                row.request.output.error = f"token {len(row.new_tokens)}: the logits are not finite"
            if row.request.output.error is not None:
                self._end(row.request, None)
                deltas += [Delta(row.request.request_id, row.completion.index, [], "", None, row.request.output.error)]
                continue
            if row.completion.logprobs is not None:
                row.completion.logprobs.append(logprob)
            if row.completion.top_logprobs is not None:
                row.completion.top_logprobs.append(top[i])
            deltas.append(self._take(row, token))
        self.tokens_done += sum(len(delta.token_ids) for delta in deltas)
        return deltas

    def _top_logprobs(self, logits: Tensor, rows: list[_Row]) -> dict[int, dict[int, float]]:
        """For each row that asks for them, its most likely tokens' log-probabilities."""
        wanted = {i: row.request.params.logprobs for i, row in enumerate(rows) if row.request.params.logprobs}
        if not wanted:
            return {}
        k = min(max(wanted.values()), logits.shape[1])
        values, ids = logits[list(wanted)].float().log_softmax(1).topk(k, dim=1)
        pairs = zip(wanted.items(), ids.tolist(), values.tolist(), strict=True)
        return {i: dict(list(zip(own_ids, own, strict=True))[:count]) for (i, count), own_ids, own in pairs}

    def _take(self, row: _Row, token: int) -> Delta:
        """Take in a token: add it to the row, and end the row where it ends."""
        request, completion, text = row.request, row.completion, row.detokenizer
        row.tokens.append(token)
        completion.token_ids.append(token)
        reason = "stop" if token in request.stop_ids else None
        if reason is None and text is not None:
            at = text.add(token)
            if at is not None:
                reason, completion.text = "stop", text.text[:at]
        if reason is None and len(row.tokens) >= request.most_tokens:
            reason = "length"
        if reason is not None:
            self._finish(row, reason)
        piece = ""
        if self.stream and text is not None:
            whole = text.text[: text.safe()] if reason is None else completion.text
            piece, row.sent = whole[row.sent :], max(row.sent, len(whole))
        return Delta(request.request_id, completion.index, [token], piece, reason)

    def _finish(self, row: _Row, reason: str | None) -> None:
        """End a row, give its blocks back, and write its text."""
        completion, request = row.completion, row.request
        completion.finish_reason, row.done = reason, True
        request.open -= 1
        self.num_done += request.open == 0
        self._running.pop(row, None)
        if row in self._waiting:
            self._waiting.remove(row)
        self._release(row)
        stopped_by_text = reason == "stop" and completion.token_ids[-1] not in request.stop_ids
        if self.decode is not None and not stopped_by_text:
            ids = completion.token_ids
            completion.text = self.decode(ids[:-1] if reason == "stop" else ids)
