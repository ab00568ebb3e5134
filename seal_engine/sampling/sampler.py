"""The Sampler: continues requests token by token, many at once, with any mix of adapters, over a paged K/V cache.

The n samples of a request are sequences. Per step, the Scheduler says which sequences compute how many tokens; the
Sampler runs the model over these, and samples the next token of each sequence that has computed all of its tokens.
Sequences of one adapter lie together in the batch, so each adapter is read once. A sequence's tokens depend only on its
own prompt, adapter and seed.
"""

from collections import abc
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seal_engine.inputs import check_token_ids, integers
from seal_engine.model.adapters import Adapter
from seal_engine.model.devices import on_device
from seal_engine.model.graphs import power_of_two
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.sampling.decode_cache import DecodeCache
from seal_engine.sampling.decode_graph import DecodeGraphs
from seal_engine.sampling.detokenizer import Decode, Detokenizer
from seal_engine.sampling.draw import Draw
from seal_engine.sampling.kv_cache import KVCache
from seal_engine.sampling.requests import Delta, RequestOutput, SamplingParams
from seal_engine.sampling.scheduler import Chunk, Request, Scheduler, Sequence
from seal_engine.types import InputError, PagedArrays, is_integer
from seal_kernels.contiguous_attention import DecodeRows
from seal_kernels.cross_entropy import logprobs_of


class _StepAdapters(NamedTuple):
    """The adapters of a step, in the order of their tokens, with the parameters that `batch` reads."""

    params: dict[Adapter | None, Tensor | None]
    tokens: list[int]
    batch: LoraBatch | None


LOGIT_ROWS = 256  # of a prompt that is scored: whose logits are held at once


class Sampler:
    """`add_request`, then `step` until `poll` gives the output; `cancel` at any time."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        decode: Decode | None,
        stop_token_ids: abc.Sequence[int],
        token_budget: int,
        seeds: abc.Iterator[int],
        max_num_seqs: int = 256,
        stream: bool = False,
        special_tokens: abc.Mapping[str, int] | None = None,
        decode_cache: DecodeCache | None = None,
    ):
        """decode: token ids to text, without special tokens; None: completions have no text. stop_token_ids: the
        model's own. token_budget: tokens per step. seeds: for requests without one. max_num_seqs: sequences that run at
        once. stream: deltas carry text. special_tokens: their ids, by their text. decode_cache: on a CPU.
        """
        self.model = model
        self.cache = cache
        self.decode = decode
        self.stop_token_ids = stop_token_ids
        self.token_budget = token_budget
        self.seeds = seeds
        self.stream = stream
        self.special_tokens = special_tokens or {}
        self.decode_cache = decode_cache
        self.scheduler = Scheduler(model, cache.pool, max_num_seqs)
        self.tokens_done = 0  # sampled
        self.tokens_computed = 0
        self.num_done = 0  # requests
        self.graphs = DecodeGraphs(model) if model.device.type == "cuda" else None
        self._requests: dict[int, Request] = {}
        self._num_submitted = 0
        self._lora: _StepAdapters | None = None
        self._ahead: Draw | None = None  # of the step that the last call of `step` launched ahead

    def add_request(
        self,
        prompt: str | None,
        token_ids: abc.Sequence[int] | InputError,
        params: SamplingParams,
        adapter: Adapter | None = None,
    ) -> int:
        """Queue a prompt and return the request's id. An invalid request fails alone: its output has an error.

        prompt: the text that token_ids were made from, for the output alone. token_ids: or the error that they raised.
        """
        request = Request(self._num_submitted, RequestOutput(prompt, [], []), params, adapter)
        self._num_submitted += 1
        try:
            if isinstance(token_ids, InputError):
                raise token_ids
            request.output.prompt_token_ids = integers(token_ids, "prompt")
            self._validate_request(request)
        except InputError as error:
            request.output.error = str(error)
            self._requests[request.request_id] = request
            self.num_done += 1
            return request.request_id
        model_stop_ids = () if params.ignore_eos else self.stop_token_ids
        special_stop_ids = [self.special_tokens[text] for text in params.stops if text in self.special_tokens]
        request.stop_ids = frozenset((*model_stop_ids, *special_stop_ids, *(params.stop_token_ids or ())))
        request.seed = next(self.seeds) if params.seed is None else params.seed
        request.output.prompt_logprobs = [] if params.scores_prompt else None
        request.output.prompt_top_logprobs = [] if params.scores_prompt and is_integer(params.prompt_logprobs) else None
        for index in range(params.n):
            watches_text = params.stops or self.stream
            detokenizer = Detokenizer(self.decode, params.stops) if self.decode and watches_text else None
            request.sequences.append(Sequence(request, index, detokenizer))
        request.output.outputs = [sequence.completion for sequence in request.sequences]
        with self._repair([]):
            self._requests[request.request_id] = request
            self.scheduler.add(request)
        return request.request_id

    def _validate_request(self, request: Request) -> None:
        """Set max_total_tokens. Raises InputError if the model or the K/V cache cannot serve the request."""
        config, params, prompt = self.model.config, request.params, request.output.prompt_token_ids
        check_token_ids(prompt, "prompt", config)
        if request.adapter is not None:
            request.adapter.check_model(config, "adapter")
        if params.stops and self.decode is None:
            raise InputError("stop: found texts, but there is no tokenizer; accepted: stop_token_ids")
        for text in params.stops:
            inside = next((token for token in self.special_tokens if token in text and token != text), None)
            if inside is not None:
                accepted = f"{inside!r} alone, or text without it: special tokens are no part of a completion's text"
                raise InputError(f"stop: found {text!r}; accepted: {accepted}")
        longest = config.max_position_embeddings
        if len(prompt) >= longest:
            raise InputError(f"prompt: found {len(prompt)} tokens; accepted: fewer than {longest}, the model's length")
        total = longest if params.max_tokens is None else min(longest, len(prompt) + params.max_tokens)
        capacity = self.cache.pool.num_blocks * self.cache.pool.block_size + 1  # the last token is never computed
        if total > capacity:
            accepted = f"at most {capacity}, which the K/V cache holds"
            raise InputError(f"max_tokens: found {total} tokens, prompt and completion; accepted: {accepted}")
        request.max_total_tokens = total

    @property
    def busy(self) -> bool:
        """True while a request is not done."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def num_resident(self) -> int:
        """The number of completions that are being worked on."""
        return len(self.scheduler.running)

    def poll(self, request_id: int) -> RequestOutput | None:
        """Return the request's output, or None while it is not done. Raises InputError for an unknown id."""
        request = self._request(request_id)
        return None if request.unfinished else request.output

    def output(self, request_id: int) -> RequestOutput:
        """Return the request's output as it is now."""
        return self._request(request_id).output

    def _request(self, request_id: int) -> Request:
        if not is_integer(request_id) or request_id not in self._requests:
            raise InputError(f"request_id: found {request_id!r}; accepted: an id that add_request returned")
        return self._requests[request_id]

    def release(self, request_id: int) -> None:
        """Cancel a request if it is not done, and drop its output: for samplers that live long."""
        self.cancel(request_id)
        self.num_done -= 1
        del self._requests[request_id]

    def cancel(self, request_id: int) -> None:
        """Stop a request: its unfinished samples end with "cancelled". A request that is done stays done."""
        request = self._request(request_id)
        with self._repair([]):
            self._abort(request, "cancelled")

    def _abort(self, request: Request, reason: str | None) -> None:
        """End all samples of a request that are not finished."""
        for sequence in request.unfinished:
            self._finish(sequence, reason)

    @contextmanager
    def _repair(self, saved: list[tuple[Sequence, int]]) -> abc.Iterator[None]:
        """Whatever interrupts the block, Ctrl-C too, leaves a sampler that goes on to the same outputs.

        saved: the sequences that the block may change, with the number of output tokens that they go back to. All K/V
        are computed again.
        """
        try:
            yield
        except BaseException:
            for sequence, num_output_tokens in saved:
                if sequence.completion.finish_reason != "cancelled":
                    sequence.truncate(num_output_tokens)
            self.scheduler.reset(self._requests.values())
            self._ahead = None
            if self.decode_cache is not None:
                self.decode_cache.clear()
            self.num_done = sum(not request.unfinished for request in self._requests.values())
            raise

    def check_integrity(self) -> None:
        """Raise a RuntimeError if the cache's referenced blocks are not exactly those of the sequences."""
        sequences = [sequence for request in self._requests.values() for sequence in request.sequences]
        self.cache.pool.check_integrity([sequence.block_table for sequence in sequences])

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Run the model once, over the next tokens of as many sequences as fit the budget; return what was sampled.

        On a GPU the next step is launched before this one's tokens are read, where it can be, so that the device
        computes while the host appends them. A step happens whole or not at all: after an exception, the next one
        begins where this one began.
        """
        saved: list[tuple[Sequence, int]] = []
        with self._repair(saved), on_device(self.model.device):
            draw = self._take_ahead(saved)
            if draw is None:
                chunks = self.scheduler.schedule(self.token_budget)
                self._save([chunk.sequence for chunk in chunks], saved)
                draw = self._compute(chunks) if chunks else None
            deltas = []
            if draw is not None:
                self._ahead = self._launch_ahead(draw)
                deltas = self._append(draw)
        if not self.busy:
            self._lora = self._ahead = None  # which hold adapters and tokens
        self.tokens_done += sum(len(delta.token_ids) for delta in deltas)
        return deltas

    def _save(self, sequences: abc.Iterable[Sequence], saved: list[tuple[Sequence, int]]) -> None:
        """Note down how many tokens these sequences have, and all samples of their requests, which may change, too."""
        several = {}  # requests of several samples
        for sequence in sequences:
            if len(sequence.request.sequences) == 1:
                saved.append((sequence, len(sequence.completion.token_ids)))
            else:
                several[sequence.request.request_id] = sequence.request
        for request in several.values():
            saved += [(sequence, len(sequence.completion.token_ids)) for sequence in request.unfinished]

    def _take_ahead(self, saved: list[tuple[Sequence, int]]) -> Draw | None:
        """The step that was launched ahead, if there is one, and if its K/V are still those of the current weights."""
        draw, self._ahead = self._ahead, None
        sequences = [] if draw is None else [sequence for sequence in draw.sequences if not sequence.finished]
        if not sequences or not all(map(self.scheduler.is_current, sequences)):
            return None
        self._save(sequences, saved)
        for sequence in sequences:
            self.scheduler.mark_computed(sequence, 1)
        return draw

    def _launch_ahead(self, draw: Draw) -> Draw | None:
        """Launch the step that computes the tokens of `draw`, which stay on the device; None where that cannot be.

        A sequence that ends with such a token has computed it for nothing. The K/V of that token lie in a block that is
        not full, so not in the prefix index; whoever gets the block writes it later, in the order of the stream.
        """
        if self.graphs is None:
            return None
        scheduler, alive = self.scheduler, [sequence for sequence in draw.sequences if not sequence.finished]
        if len(alive) < len(scheduler.running):  # others are still computing their prompts
            return None
        continued = [s for s in alive if len(s.token_ids) + 1 < s.request.max_total_tokens]
        if scheduler.waiting and len(continued) < scheduler.max_num_seqs:
            return None  # the next step may admit some
        if any(sequence.needs_last_token for sequence in continued):
            return None
        chunks = scheduler.reserve_ahead(continued, self.token_budget)
        if not chunks:
            return None
        hidden = self._hidden_states(chunks, draw)
        return Draw(self.model, hidden, range(len(chunks)), [chunk.sequence for chunk in chunks], unread=1)

    def _compute(self, chunks: list[Chunk]) -> Draw | None:
        """Compute what was scheduled, and draw the next token of each sequence that is computed to its end."""
        hidden = self._hidden_states(chunks)
        ready: list[Sequence] = []  # those whose next token can be sampled
        rows: list[int] = []  # their last tokens' rows of `hidden`
        end = 0
        for sequence, num_tokens, _ in chunks:
            start, end = end, end + num_tokens
            if sequence.request.params.scores_prompt:
                self._score_prompt(sequence, hidden[start:end])
            newly_ready = self.scheduler.mark_computed(sequence, num_tokens)
            ready += newly_ready
            rows += [end - 1] * len(newly_ready)
        return Draw(self.model, hidden, rows, ready, unread=0) if ready else None

    def _hidden_states(self, chunks: list[Chunk], unread: Draw | None = None) -> Tensor:
        """Sort the chunks by adapter and run the model over them: [T, D]. unread: has the tokens of a step ahead."""
        self.cache.copy([chunk.block_copy for chunk in chunks if chunk.block_copy is not None])
        chunks.sort(key=lambda chunk: getattr(chunk.sequence.request.adapter, "uid", 0))
        decoding = [] if self.decode_cache is None else self.decode_cache.take(chunks)
        arrays, keys, values = self._arrays(chunks, decoding), self.cache.keys, self.cache.values
        decodes = self.graphs is not None and all(chunk.num_tokens == 1 for chunk in chunks)
        lora, tokens = self._lora_batch(chunks, decodes)
        if self.graphs is not None and decodes:
            token_ids = None if unread is None else unread.tokens_of([chunk.sequence for chunk in chunks])
            hidden = self.graphs.hidden_states(arrays, keys, values, lora, tokens, token_ids)
        else:
            hidden = self.model.hidden_states(arrays.batch(keys, values, decoding), lora)
        if self.decode_cache is not None and decoding:
            self.decode_cache.flush()
        self.tokens_computed += len(hidden)
        return hidden

    def _arrays(self, chunks: list[Chunk], decoding: list[DecodeRows]) -> PagedArrays:
        block_size = self.cache.pool.block_size
        counts = np.array([chunk.num_tokens for chunk in chunks])
        starts = np.array([chunk.sequence.num_computed_tokens for chunk in chunks])
        tables = np.zeros((len(chunks), max(len(chunk.sequence.block_table) for chunk in chunks)), dtype=np.int32)
        token_ids: list[int] = []
        for i, (sequence, num_tokens, _) in enumerate(chunks):
            tables[i, : len(sequence.block_table)] = sequence.block_table
            token_ids += sequence.token_ids[starts[i] : starts[i] + num_tokens] or [0]  # one that is not read yet
        bounds = np.concatenate([[0], counts.cumsum()])
        owner = np.repeat(np.arange(len(chunks)), counts)  # the chunk of each token
        positions = np.arange(bounds[-1]) - bounds[owner] + starts[owner]
        slot_mapping = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        context_lens = (starts + counts).astype(np.int32)
        for rows in decoding:  # they are not in the paged cache
            tokens = slice(None) if rows.tokens is None else rows.tokens.numpy()
            slot_mapping[tokens], context_lens[owner[tokens]] = -1, 0
        return PagedArrays(np.array(token_ids), positions, bounds.astype(np.int32), context_lens, tables, slot_mapping)

    def _lora_batch(self, chunks: list[Chunk], decodes: bool) -> tuple[LoraBatch | None, list[int]]:
        """(the adapters of a step, the step's tokens of each of its segments); the last step's adapters if they serve.

        For a decode graph they serve, too, if some of them have no token in this step: sequences end in most steps, and
        tables take the host longer than the step takes the device.
        """
        wanted: dict[Adapter | None, int] = {}
        for chunk in chunks:
            adapter = chunk.sequence.request.adapter
            wanted[adapter] = wanted.get(adapter, 0) + chunk.num_tokens
        if not any(wanted):
            return None, []
        params = {adapter: None if adapter is None else adapter.params for adapter in wanted}
        last = self._lora
        if last is not None and all(last.params.get(adapter) is p for adapter, p in params.items()):
            tokens = [wanted.get(adapter, 0) for adapter in last.params]
            fits = wanted.keys() <= last.params.keys() and len(tokens) <= power_of_two(len(chunks))
            if (decodes and fits) or (list(wanted), tokens) == (list(last.params), last.tokens):
                return last.batch, tokens
        tokens = list(wanted.values())
        self._lora = _StepAdapters(params, tokens, LoraBatch.make(list(wanted), tokens))
        return self._lora.batch, tokens

    def _score_prompt(self, sequence: Sequence, hidden: Tensor) -> None:
        """Append the log-probabilities of the prompt tokens that a chunk's hidden states predict."""
        output, start = sequence.request.output, sequence.num_computed_tokens
        prompt, scored = output.prompt_token_ids, output.prompt_logprobs or []
        first = len(scored)  # this token predicts the next one to score; start is before it after a preemption
        if sequence.completion.index == 0 and first < len(prompt) - 1:
            hidden = hidden[first - start : len(prompt) - 1 - start]
            targets = torch.tensor(prompt[first + 1 : first + 1 + len(hidden)], device=hidden.device)
            if output.prompt_top_logprobs is None:
                output.prompt_logprobs = scored + self.model.token_logprobs(hidden, targets.long()).tolist()
            else:
                values, top = self._top_logprobs(hidden, targets, int(sequence.request.params.prompt_logprobs))
                output.prompt_logprobs = scored + values
                output.prompt_top_logprobs = output.prompt_top_logprobs[: len(scored)] + top

    def _top_logprobs(self, hidden: Tensor, targets: Tensor, count: int) -> tuple[list[float], list[dict[int, float]]]:
        """Log-probabilities of the targets [n] that the hidden states [n, D] predict, and of the most likely tokens.

        One computation, so that a target that is most likely has the largest number exactly.
        """
        values: list[float] = []
        top: list[dict[int, float]] = []
        for rows, tokens in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = self.model.logits(rows)
            ids = torch.cat([tokens[:, None], logits.topk(min(count, logits.shape[1]), dim=1).indices], 1)
            for row_ids, row_values in zip(ids.tolist(), logprobs_of(logits, ids).tolist(), strict=True):
                values.append(row_values[0])
                top.append(dict(zip(row_ids[1:], row_values[1:], strict=True)))
        return values, top

    def _append(self, draw: Draw) -> list[Delta]:
        """Append the drawn tokens to their sequences."""
        deltas = []
        for sequence, token, logprob, top_logprobs in draw.read():
            if sequence.finished:  # it ended or was cancelled since, or another sequence has just failed its request
                continue
            request, completion = sequence.request, sequence.completion
            if token < 0 and request.output.error is None:
                request.output.error = f"token {len(completion.token_ids)}: the logits are not finite"
            if request.output.error is not None:
                self._abort(request, None)
                deltas.append(Delta(request.request_id, completion.index, [], "", None, request.output.error))
                continue
            if completion.logprobs is not None and logprob is not None:
                completion.logprobs.append(logprob)
            if completion.top_logprobs is not None and top_logprobs is not None:
                completion.top_logprobs.append(top_logprobs)
            deltas.append(self._append_token(sequence, token))
        return deltas

    def _append_token(self, sequence: Sequence, token: int) -> Delta:
        """Append a token to the sequence, and finish the sequence at a stop or at its length."""
        request, completion, detokenizer = sequence.request, sequence.completion, sequence.detokenizer
        sequence.token_ids.append(token)
        completion.token_ids.append(token)
        reason = "stop" if token in request.stop_ids else None
        if reason is None and detokenizer is not None:
            stop_at = detokenizer.add(token)
            if stop_at is not None and len(completion.token_ids) > request.params.min_tokens:
                reason, completion.text = "stop", detokenizer.text[:stop_at]
        if reason is None and len(sequence.token_ids) >= request.max_total_tokens:
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason)
        new_text = ""
        if self.stream and detokenizer is not None:
            text = detokenizer.text[: detokenizer.stable_chars()] if reason is None else completion.text
            new_text = text[sequence.num_sent_chars :]
            sequence.num_sent_chars = max(sequence.num_sent_chars, len(text))
        return Delta(request.request_id, completion.index, [token], new_text, reason)

    def _finish(self, sequence: Sequence, reason: str | None) -> None:
        """End a sequence, free its blocks, and write the completion's text."""
        completion, request = sequence.completion, sequence.request
        stopped_by_text = reason == "stop" and completion.token_ids[-1] not in request.stop_ids
        if self.decode is not None and not stopped_by_text:
            completion.text = self.decode(completion.token_ids[:-1] if reason == "stop" else completion.token_ids)
        self.scheduler.remove(sequence)
        completion.finish_reason, sequence.finished = reason, True
        if not request.unfinished:
            self.num_done += 1
