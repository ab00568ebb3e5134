"""Trains many jobs at once, each with its own schedule.

The Trainer makes one pass per step: the next micro-step of as many resident jobs as fit the token budget, packed into
one stream, each adapter's tokens together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from seal_engine.model.adapter_stack import stack_adapters
from seal_engine.model.adapters import Adapter
from seal_engine.model.devices import on_device
from seal_engine.model.transformer import Model
from seal_engine.training.job_checkpoint import load_checkpoint, save_checkpoint
from seal_engine.training.jobs import TrainJob, TrainResult, TrainSequence
from seal_engine.training.losses import job_losses
from seal_engine.training.pass_graph import PassGraphs
from seal_engine.training.schedule import JobState
from seal_engine.training.verbs import AdapterBatch, advance_adapters, target_logprobs, validate_dtype
from seal_engine.types import InputError, is_integer
from seal_kernels.transfer import HostCopy


class Trainer:
    """Runs jobs: `submit`, then `step` until `poll` gives a result; `cancel` at any time. Jobs join as others leave."""

    def __init__(
        self,
        model: Model,
        prepare: Callable[[TrainJob], list[TrainSequence]],
        token_budget: int,
        state_bytes: int | None = None,
        recompute: str = "none",
        kept_tokens: int = 0,
        graph_tokens: int = 0,
        callback: Callable[[int, int, float], None] | None = None,
    ):
        """prepare: a job's sequences as checked token ids. token_budget: tokens per pass. state_bytes: what parameters,
        gradients and moments of resident jobs and the parameters of finished ones may take (one job is always
        admitted); None: no limit. recompute: what backward computes again, but in passes of at most kept_tokens tokens,
        which keep all activations. graph_tokens: a pass of at most so many tokens is a CUDA graph. callback(job_id,
        step, loss) is called after every optimizer step.
        """
        validate_dtype(model)
        self.model = model
        self.prepare = prepare
        self.token_budget = token_budget
        self.state_bytes = state_bytes
        self.recompute, self.kept_tokens = recompute, kept_tokens
        self.graph_tokens = graph_tokens
        self.callback = callback
        self.tokens_done = 0
        self._waiting: list[tuple[int, TrainJob]] = []
        self._resident: list[JobState] = []
        self._results: dict[int, TrainResult] = {}
        self._finished: list[Adapter] = []  # on the device, of these bytes together
        self._finished_bytes = 0
        self._free_states: list[Tensor] = []  # gradients and moments of jobs that have left, all of one size
        # (jobs of a pass, those whose optimizer step it ended, losses of the ones and gradient norms of the others)
        self._pending: list[tuple[list[JobState], list[JobState], HostCopy]] = []
        # (job, loss of its part of a pass, gradient norm if that ended an optimizer step). loss None: its end is due.
        self._events: list[tuple[JobState, float | None, float | None]] = []
        self._submitted = 0

    def submit(self, job: TrainJob) -> int:
        """Queue a job; returns its id. A job that cannot be trained fails alone: its result has an error."""
        job_id, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append((job_id, job))
        return job_id

    @property
    def busy(self) -> bool:
        """True while a job is waiting or resident."""
        return bool(self._waiting or self._resident or self._pending or self._events)

    @property
    def num_resident(self) -> int:
        """Jobs that are being trained."""
        return len(self._resident)

    @property
    def num_done(self) -> int:
        """Jobs that have a result."""
        return len(self._results)

    def result(self, job_id: int) -> TrainResult:
        """The result of a job that is done."""
        return self._results[job_id]

    def poll(self, job_id: int) -> TrainResult | None:
        """The job's result, or None while it is not done. Raises InputError for an id that was never given out."""
        if not is_integer(job_id) or not 0 <= job_id < self._submitted:
            raise InputError(f"job_id: found {job_id!r}; accepted: an id that submit returned")
        return self._results.get(job_id)

    def cancel(self, job_id: int) -> None:
        """Stop a job; its result says so. A job that is done stays done."""
        if self.poll(job_id) is not None:
            return
        self._waiting = [(i, job) for i, job in self._waiting if i != job_id]
        state = next((state for state in self._resident if state.job_id == job_id), None)
        if state is None:
            self._results[job_id] = TrainResult(None, [], 0, "cancelled")
        else:
            self._fail(state, "cancelled")

    def release(self, job_id: int) -> None:
        """Cancel a job if it is not done, and drop its result: for trainers that live long."""
        self.cancel(job_id)
        if self._results[job_id].error is not None:
            self._collect_losses()  # of passes that the job was in: without its result they would count
        adapter = self._results.pop(job_id).adapter
        if adapter in self._finished:
            self._finished.remove(adapter)
            self._finished_bytes -= adapter.nbytes

    def step(self) -> None:
        """One pass: the next micro-step of as many jobs as fit the token budget, and the optimizer steps now due.

        On a GPU the losses of a pass are read after the next one is launched, so that the device need not wait.

        Resident jobs go first, those that were left out of the last pass before the others. While the pass has room,
        waiting jobs are admitted one at a time; the first that does not fit is resident and goes first in the next
        pass. So no job is skipped for a smaller one, and hardly any memory lies idle.

        A step happens whole or not at all; a job that an exception leaves half-way fails, and the others go on.
        """
        with on_device(self.model.device):
            self._step()

    def _step(self) -> None:
        for state in [state for state in self._resident if state.job_id in self._results]:
            self._release(state)  # an interrupt came between its result and this
        self._collect_losses(self._max_unread())
        chosen: list[JobState] = []
        num_tokens = 0
        for state in self._candidates():
            if chosen and num_tokens + state.next_tokens > self.token_budget:
                break
            if state.next is not None:
                chosen.append(state)
                num_tokens += state.next_tokens
        if not chosen:
            self._collect_losses()
            return
        self._train_micro_steps(chosen)
        self.tokens_done += num_tokens
        done = {state.job_id for state in chosen}
        self._resident = [state for state in self._resident if state.job_id not in done] + chosen
        self._collect_losses(self._max_unread() if any(state.next for state in self._resident) else 0)

    def _max_unread(self) -> int:
        """How many passes' losses may stay unread: on a GPU those of one pass, so that it has work while the host
        prepares the next. None where a checkpoint may be due, which is written when the loss of its step is read.
        """
        checkpoints = any(state.job.checkpoint_dir is not None for state in self._resident)
        return 0 if checkpoints or self.model.device.type == "cpu" else 1

    def _candidates(self) -> Iterator[JobState]:
        """Resident jobs, then waiting ones; a waiting job is admitted when it is asked for."""
        yield from list(self._resident)
        while (state := self._admit()) is not None:
            yield state

    def _train_micro_steps(self, chosen: list[JobState]) -> None:
        """One pass over the chosen jobs' next micro-steps; its losses are read by `_collect_losses`."""
        batches, weights = [], []
        for state in chosen:
            if state.next is None:
                continue
            sequences = [state.ids[i] for i in state.next.members]
            targets = [state.targets[i] for i in state.next.members]
            dropout_key = (state.job.seed or 0, state.num_micro_steps)
            soft = [state.soft[i] for i in state.next.members]
            begins = state.next.begins_step
            batches.append(AdapterBatch(state.adapter, sequences, targets, dropout_key, soft, begins=begins))
            weights.append(state.next.weight)
        backward = self._forward(batches, weights)
        with self._whole_or_failed(chosen):
            losses = backward()
            stepping = [state for state in chosen if state.next is not None and state.next.ends_step]
            for state in stepping:
                if state.trained is not None and state.adapter.grads is not None:
                    state.adapter.grads.mul_(state.trained)
            if stepping:
                norms = advance_adapters([(state.adapter, state.adam()) for state in stepping], zero_grads=False)
                losses = torch.cat([losses, norms])
            for state in chosen:
                state.advance()
            self._pending.append((chosen, stepping, HostCopy(losses)))

    def _forward(self, batches: Sequence[AdapterBatch], weights: Sequence[float]) -> Callable[[], Tensor]:
        """Returns what adds the gradients of the jobs' losses, and returns these losses, [jobs] float64."""
        tokens = sum(len(sequence) for part in batches for sequence in part.sequences)
        soft = any(pair is not None for part in batches for pair in part.soft)
        if tokens <= self.graph_tokens and not soft and not self.model.batch_invariant:
            return partial(PassGraphs.of(self.model).backward, self.model, batches, weights)
        recompute = "none" if tokens <= self.kept_tokens else self.recompute
        logprobs, counts, _ = target_logprobs(self.model, batches, recompute)
        losses, gradient = job_losses(logprobs, counts, weights)

        def backward() -> Tensor:
            logprobs.backward(gradient)
            return losses

        return backward

    @contextmanager
    def _whole_or_failed(self, states: Sequence[JobState]) -> Iterator[None]:
        """An exception in the block, Ctrl-C too, fails the jobs that it leaves half-way; other jobs go on."""
        try:
            yield
        except BaseException as error:
            for state in states:
                if state.job_id not in self._results:
                    self._fail(
                        state, f"step {len(state.losses)}: interrupted by {type(error).__name__} {error}".strip()
                    )
            raise

    def _collect_losses(self, max_unread: int = 0) -> None:
        """Read the losses and norms of passes that have been made, but for the last max_unread ones.

        An exception, of the callback for example, loses nothing: what is not recorded yet is recorded by the next call.
        """
        while len(self._pending) > max_unread:
            chosen, stepping, numbers = self._pending[0]
            losses = numbers.tolist()
            norm_of = dict(zip(stepping, losses[len(chosen) :], strict=True))
            events = [(state, loss, norm_of.get(state)) for state, loss in zip(chosen, losses, strict=False)]
            self._pending, self._events = self._pending[1:], [*self._events, *events]
        while self._events:
            state, loss, norm = self._events[0]
            if state.job_id in self._results:  # cancelled, or failed in an earlier pass
                self._events = self._events[1:]
            elif loss is None:
                self._events = self._events[1:]
                with self._whole_or_failed([state]):
                    self._end_optimizer_step(state)
            else:
                with self._whole_or_failed([state]):
                    self._events = self._events[1:]
                    state.step_loss += loss
                    counts = norm is not None and self._record_loss(state, norm)
                if counts and self.callback is not None:
                    self.callback(state.job_id, len(state.losses), state.losses[-1])

    def _record_loss(self, state: JobState, norm: float) -> bool:
        """Record the loss of an optimizer step, or fail the job that diverged; returns whether the loss is recorded."""
        loss, state.step_loss = state.step_loss, 0.0
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                self._fail(state, f"step {len(state.losses)}: the {what} is {value}; the adapter diverged")
                return False
        state.losses.append(loss)
        self._events = [(state, None, None), *self._events]  # its end is due, after the callback
        return True

    def _end_optimizer_step(self, state: JobState) -> None:
        """End the job, or save its checkpoint, where that is due."""
        if state.next is None and len(state.losses) == state.total_steps:
            result = TrainResult(state.adapter, state.losses, len(state.losses), num_tokens=state.num_tokens)
            self._results[state.job_id] = result
            self._finished.append(state.adapter)
            self._finished_bytes += state.adapter.nbytes
            self._release(state)
        elif state.job.checkpoint_dir is not None and len(state.losses) % state.job.checkpoint_every == 0:
            try:
                save_checkpoint(state)
            except InputError as error:
                self._fail(state, str(error))

    def _release(self, state: JobState) -> None:
        """The job's gradients and moments become the next job's: fresh memory costs a CPU more than zeroing it does."""
        self._resident = [resident for resident in self._resident if resident is not state]
        memory = state.adapter.release_optimizer_state()
        if memory is not None:
            self._free_states.append(memory)

    def _fail(self, state: JobState, error: str) -> None:
        self._results[state.job_id] = TrainResult(None, state.losses, len(state.losses), error, state.num_tokens)
        self._release(state)

    def _admit(self) -> JobState | None:
        """Make the next waiting job that can be trained resident; None if there is none or no memory for it."""
        while self._waiting:
            job_id, job = self._waiting[0]
            try:
                state = self._job_state(job_id, job)
            except InputError as error:
                self._waiting.pop(0)
                self._results[job_id] = TrainResult(None, [], 0, str(error))
                continue
            if state is not None:
                self._waiting, self._resident = self._waiting[1:], [*self._resident, state]
            return state
        return None

    def _job_state(self, job_id: int, job: TrainJob) -> JobState | None:
        """The job with its adapter; None if its memory does not fit now. InputError for one that cannot be trained."""
        if not isinstance(job, TrainJob):
            raise InputError(f"jobs: found {type(job).__name__}; accepted: a TrainJob")
        job.check()
        sequences = self.prepare(job)
        if job.init_from is not None:
            if not isinstance(job.init_from, Adapter):
                raise InputError(f"init_from: found {type(job.init_from).__name__}; accepted: an Adapter")
            job.init_from.check_model(self.model.config, "init_from")
            job = replace(job, lora=job.init_from.config)
        size = Adapter(self.model.config, job.lora, torch.device("meta")).nbytes  # before memory is taken
        if job.on_top_of is not None:
            if not isinstance(job.on_top_of, Adapter):
                raise InputError(f"on_top_of: found {type(job.on_top_of).__name__}; accepted: an Adapter")
            job.on_top_of.check_model(self.model.config, "on_top_of")
            size += job.on_top_of.nbytes
        if not self._make_room(4 * size) and self._resident:
            return None
        if job.init_from is not None:
            adapter = job.init_from.copy()
        else:
            adapter = Adapter.create(self.model.config, job.lora, self.model.device, job.seed or 0)
        if job.on_top_of is not None:
            adapter = stack_adapters([(job.on_top_of, 1.0), (adapter, 1.0)])  # its rank rows lie above the others
        if self._free_states and self._free_states[-1].shape[1] != adapter.layout.size:
            self._free_states.clear()  # of another size: given back, so that memory stays within its bound
        adapter.allocate_optimizer_state(self._free_states.pop() if self._free_states else None)
        state = JobState(job_id, job, sequences, adapter, self.token_budget)
        load_checkpoint(state)
        return state

    def _make_room(self, num_bytes: int) -> bool:
        """Whether a job of so many bytes fits the bound beside resident and finished ones.

        On a GPU finished adapters move to host memory where they stand in the way, those that finished first before
        the others.
        """
        if self.state_bytes is None:
            return True
        resident = sum(4 * state.adapter.nbytes for state in self._resident)
        while resident + self._finished_bytes + num_bytes > self.state_bytes and self._finished:
            freed = self._finished[0].offload()
            if not freed:
                break  # a CPU's adapters are in host memory already
            self._finished, self._finished_bytes = self._finished[1:], self._finished_bytes - freed
        return resident + self._finished_bytes + num_bytes <= self.state_bytes
