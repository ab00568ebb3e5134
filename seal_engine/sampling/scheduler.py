"""The Scheduler: which sequences compute how many tokens per step, and which blocks of the K/V cache they hold.

A step computes one token of each sequence that is being continued, then chunks of prompts, up to a token budget; on a
CPU prompts that fill it by themselves are a step of their own. The sequences of a request share their prompt's blocks
and copy the last one when they write to it. Other requests find a common prefix through the prefix index (kv_cache.py),
among the blocks of their own model and adapter version. When blocks run out, the youngest sequence is preempted: it
gives its blocks back and is computed again later.
"""

from collections import abc, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ref

import numpy as np

from seal_engine.model.adapters import Adapter
from seal_engine.model.transformer import Model
from seal_engine.sampling.detokenizer import Detokenizer
from seal_engine.sampling.kv_cache import BlockPool, OutOfBlocks
from seal_engine.sampling.requests import Completion, RequestOutput, SamplingParams
from seal_kernels.dispatch import ceil_div

# A CPU computes prompts and the tokens that follow them faster apart than in one step; on a GPU these cost little more
# than the prompts. So many steps of prompts in a row keep the sequences that are being continued waiting.
MAX_PROMPT_STEPS = 8


@dataclass(eq=False)
class Request:
    """A prompt to continue, its output so far, and one sequence per sample."""

    request_id: int
    output: RequestOutput
    params: SamplingParams
    adapter: Adapter | None
    stop_ids: frozenset[int] = frozenset()
    max_total_tokens: int = 0  # prompt and completion together
    seed: int = 0
    sequences: list["Sequence"] = field(default_factory=list)
    forked: bool = False  # the prompt has been computed, and the sequences after the first were queued

    @property
    def unfinished(self) -> list["Sequence"]:
        """The sequences that are not finished; none of a request that failed before it was queued."""
        return [sequence for sequence in self.sequences if not sequence.finished]


class Sequence:
    """One sample of a request."""

    def __init__(self, request: Request, index: int, detokenizer: Detokenizer | None):
        self._request = ref(request)  # not counted: a request holds its sequences, and its adapter goes with it
        self.token_ids = list(request.output.prompt_token_ids)  # prompt and completion
        self.block_table: list[int] = []  # empty while the sequence waits
        self.num_computed_tokens = 0  # tokens whose K/V are in these blocks
        self.cache_namespace: Hashable = ()  # versions of the model and the adapter that computed the K/V
        self.completion = Completion(index)
        if request.params.logprobs is not None:
            self.completion.logprobs = []
            self.completion.top_logprobs = [] if request.params.logprobs else None
        self.detokenizer = detokenizer
        self.num_sent_chars = 0  # characters of the text that deltas have handed out
        self.finished = False
        generator = np.random.SeedSequence(request.seed, spawn_key=(index,))
        self.seed = int(generator.generate_state(1, np.uint64)[0] >> np.uint64(1))

    @property
    def request(self) -> Request:
        """The request that this is a sample of."""
        request = self._request()
        assert request is not None, "a sequence is used while the sampler holds its request"
        return request

    def truncate(self, num_output_tokens: int) -> None:
        """Forget the output tokens after the first num_output_tokens, with all that followed from them."""
        completion, output_ids = self.completion, self.completion.token_ids[:num_output_tokens]
        prompt = self.token_ids[: len(self.request.output.prompt_token_ids)]
        self.token_ids, completion.token_ids = [*prompt, *output_ids], output_ids
        completion.text, completion.finish_reason, self.finished = "", None, False
        self.request.output.error = None
        for values in (completion.logprobs, completion.top_logprobs):
            if values is not None:
                del values[num_output_tokens:]
        if self.detokenizer is not None:
            self.detokenizer.replay(output_ids)

    @property
    def needs_last_token(self) -> bool:
        """Whether what is sampled after the next token depends on that token, and not on its K/V alone."""
        params = self.request.params
        is_short = len(self.completion.token_ids) + 1 < params.min_tokens  # stop ids are not to be sampled yet
        return params.logits_hook is not None or params.penalizes or is_short

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be sampled; 0 only while it is being sampled."""
        return len(self.token_ids) - self.num_computed_tokens


class Chunk(NamedTuple):
    """The part of a sequence that one step computes: its next num_tokens tokens."""

    sequence: Sequence
    num_tokens: int
    block_copy: tuple[int, int] | None  # the K/V of the first block are to be copied to the second one before


class Scheduler:
    """Owns the queues of waiting and running sequences, and the blocks that the running ones hold."""

    def __init__(self, model: Model, pool: BlockPool, max_num_seqs: int):
        """model: its version tells which K/V may be reused. max_num_seqs: sequences that run at once."""
        self.model = model
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # the oldest first
        self.tokens_reused = 0  # whose K/V the prefix index had
        self._prompt_steps_left = 0  # how many more may compute prompts alone

    def add(self, request: Request) -> None:
        """Queue the first sequence of a request; the others start when it has computed the prompt."""
        self.waiting.append(request.sequences[0])

    def reset(self, requests: abc.Iterable[Request]) -> None:
        """Free all blocks, forget all prefixes, and let the unfinished sequences of these requests wait, in order."""
        self.pool.reset()
        self.running.clear()
        self.waiting.clear()
        for request in requests:
            request.forked = any(sequence.completion.token_ids for sequence in request.sequences)
            for sequence in request.sequences:
                sequence.block_table, sequence.num_computed_tokens = [], 0
            self.waiting.extend(request.unfinished if request.forked else request.unfinished[:1])

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue and free its blocks."""
        self.running.pop(sequence, None)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)

    def schedule(self, token_budget: int) -> list[Chunk]:
        """Return what the next step computes, with blocks reserved for it."""
        for sequence in list(reversed(self.running)):
            if sequence.cache_namespace != self._current_namespace(sequence):
                self.preempt(sequence)  # its adapter or the base was trained: its K/V are of another model
        for sequence in self.running:
            if sequence.num_uncomputed == 0:  # the last step was interrupted before it sampled the next token
                sequence.num_computed_tokens -= 1
        self._admit(token_budget)
        return self._reserve_blocks(token_budget)

    def is_current(self, sequence: Sequence) -> bool:
        """Whether a sequence runs, with K/V of the weights as they are now."""
        return sequence in self.running and sequence.cache_namespace == self._current_namespace(sequence)

    def reserve_ahead(self, sequences: abc.Sequence[Sequence], token_budget: int) -> list[Chunk]:
        """Reserve blocks for the next token of sequences whose tokens are all computed; [] if it takes preemption."""
        if len(sequences) > min(token_budget, self.pool.num_available):  # each may need a block
            return []
        chunks = [self._allocate(sequence, 1) for sequence in sequences]
        return [chunk for chunk in chunks if chunk is not None]

    def mark_computed(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """Record that the next tokens have been computed. Returns the sequences that can sample from the last one."""
        num_full = sequence.num_computed_tokens // self.pool.block_size
        sequence.num_computed_tokens += num_tokens
        if sequence.num_computed_tokens // self.pool.block_size > num_full:
            table, num_computed = sequence.block_table, sequence.num_computed_tokens
            self.pool.register(sequence.cache_namespace, sequence.token_ids, table, num_computed)
        return [] if sequence.num_uncomputed > 0 else [sequence, *self._fork(sequence)]

    def preempt(self, sequence: Sequence) -> None:
        """Free the blocks of a running sequence and let it wait; all its tokens will be computed again."""
        del self.running[sequence]
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table, sequence.num_computed_tokens = [], 0

    @property
    def _reading(self) -> list[Sequence]:
        """The running sequences that are still computing their prompts."""
        return [sequence for sequence in self.running if sequence.num_uncomputed > 1]

    def _current_namespace(self, sequence: Sequence) -> Hashable:
        adapter = sequence.request.adapter
        return (self.model.version,) if adapter is None else (self.model.version, adapter.uid, adapter.version)

    def _admit(self, token_budget: int) -> None:
        """Start waiting sequences as long as the budget has tokens left and the pool has blocks for all their tokens.

        A sequence is deferred while its next block is being computed for another one: equal prompts are computed once.
        """
        pool, running, reading = self.pool, self.running, self._reading
        competing = reading if self._prompt_steps_left else running  # for the step's tokens
        budget = token_budget - sum(sequence.num_uncomputed for sequence in competing)
        blocks_in_flight = {
            self._next_block_key(s.cache_namespace, s.token_ids, s.num_computed_tokens) for s in reading
        }
        deferred: list[Sequence] = []
        while self.waiting and len(running) < self.max_num_seqs and (budget > 0 or not running):
            sequence = self.waiting[0]
            request, token_ids, namespace = sequence.request, sequence.token_ids, self._current_namespace(sequence)
            is_new = sequence.completion.index == 0 and not sequence.completion.token_ids
            scores_prompt = request.params.scores_prompt and is_new  # and must compute all of it
            table = [] if scores_prompt else pool.match(namespace, token_ids)
            num_matched = len(table) * pool.block_size
            # The last token is left out of this key, because it is always computed.
            next_block = self._next_block_key(namespace, token_ids[:-1], num_matched)
            if next_block in blocks_in_flight and not scores_prompt:
                pool.free(table)
                deferred.append(self.waiting.popleft())
                continue
            # Sequences grow: one that is started without spare blocks would soon be preempted again.
            num_needed = self._num_blocks(len(token_ids)) - len(table) + len(running) // 8
            if num_needed > pool.num_available and running:
                pool.free(table)
                break
            self.waiting.popleft()
            if scores_prompt and namespace != sequence.cache_namespace:
                request.output.prompt_logprobs = []  # those so far are of another model
                if request.output.prompt_top_logprobs is not None:
                    request.output.prompt_top_logprobs = []
            self._start(sequence, namespace, table, num_matched)
            self.tokens_reused += num_matched
            budget -= sequence.num_uncomputed
            blocks_in_flight.add(self._next_block_key(namespace, token_ids, num_matched))
        self.waiting.extendleft(reversed(deferred))

    def _start(self, sequence: Sequence, cache_namespace: Hashable, block_table: list[int], num_computed: int) -> None:
        sequence.cache_namespace, sequence.block_table = cache_namespace, block_table
        sequence.num_computed_tokens = num_computed
        self.running[sequence] = None

    def _next_block_key(self, cache_namespace: Hashable, token_ids: list[int], num_computed: int) -> Hashable:
        """Prefix key of the first KV block that this sequence has not filled.

        Equal keys mean the same computation, so the later sequence waits for it. An incomplete block gets a unique key.
        """
        end = (num_computed // self.pool.block_size + 1) * self.pool.block_size
        return (cache_namespace, *token_ids[:end]) if end <= len(token_ids) else object()

    def _num_blocks(self, num_tokens: int) -> int:
        return ceil_div(num_tokens, self.pool.block_size)

    def _reserve_blocks(self, token_budget: int) -> list[Chunk]:
        """Reserve blocks for as many tokens as fit the budget; sequences that are being continued come first, unless
        this is a step of prompts alone."""
        reading = self._reading
        if self._prompt_steps_left and sum(sequence.num_uncomputed for sequence in reading) >= token_budget:
            self._prompt_steps_left -= 1
            chunks = self._reserve_blocks_for(reading, token_budget)
            if chunks:  # or there were no blocks
                return chunks
        elif self.model.device.type == "cpu":
            self._prompt_steps_left = MAX_PROMPT_STEPS
        continued = [sequence for sequence in self.running if sequence.num_uncomputed <= 1]
        return self._reserve_blocks_for([*continued, *self._reading], token_budget)

    def _reserve_blocks_for(self, sequences: list[Sequence], token_budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in sequences:
            num_tokens = min(sequence.num_uncomputed, token_budget)
            while num_tokens > 0 and sequence in self.running:  # it may be preempted, by itself or by an earlier one
                chunk = self._allocate(sequence, num_tokens)
                if chunk is not None:
                    chunks.append(chunk)
                    token_budget -= num_tokens
                    break
                self.preempt(next(reversed(self.running)))  # the youngest
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    def _allocate(self, sequence: Sequence, num_tokens: int) -> Chunk | None:
        """Extend the block table by the next tokens and make their first block writable; None if blocks ran out."""
        table, num_computed = sequence.block_table, sequence.num_computed_tokens
        num_missing = self._num_blocks(num_computed + num_tokens) - len(table)
        new_blocks = self.pool.allocate(max(0, num_missing))
        if new_blocks is None:
            return None
        table += new_blocks
        try:
            block_copy = self.pool.copy_on_write(table, num_computed // self.pool.block_size)
        except OutOfBlocks:
            return None
        return Chunk(sequence, num_tokens, block_copy)

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Start the other sequences of a request on the blocks of the first, which has just computed the prompt.

        Returns those that were started. Those beyond max_num_seqs wait, and will match the prompt's full blocks.
        """
        request = sequence.request
        if sequence.completion.index > 0 or request.forked:
            return []
        request.forked = True
        siblings = [sibling for sibling in request.unfinished if sibling is not sequence]
        num_started = max(0, self.max_num_seqs - len(self.running))
        for sibling in siblings[:num_started]:
            self.pool.share(sequence.block_table)
            table, num_computed = list(sequence.block_table), sequence.num_computed_tokens
            self._start(sibling, sequence.cache_namespace, table, num_computed)
        self.waiting.extendleft(reversed(siblings[num_started:]))
        return siblings[:num_started]
