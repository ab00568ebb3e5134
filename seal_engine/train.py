"""Training: two verbs over any mix of adapters, and a loop over them that runs jobs.

`forward_backward` adds to the gradients of the adapters in its data; `optim_step` advances any set of adapters. The
Trainer makes one pass a step: the next piece of work of as many resident jobs as fit the token budget, packed into one
stream, each adapter's tokens together. How a job is cut into pieces depends on the job and the budget alone, so its
adapter does not depend on which jobs share its steps.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seal_engine.adapters import Adapter, LoraBatch
from seal_engine.inputs import check_token_ids, integers
from seal_engine.jobs import AdamParams, Datum, DatumResult, TrainJob, TrainResult, TrainSequence
from seal_engine.model import Model
from seal_engine.types import InputError, PackedBatch, chunks, is_integer, require
from seal_kernels.adamw import Hyper, adamw_step


@dataclass(frozen=True)
class Work:
    """One adapter's sequences in a pass; targets[i][j]: is token j of sequence i predicted there (never token 0)."""

    adapter: Adapter
    sequences: Sequence[Sequence[int]]
    targets: Sequence[Sequence[bool]]
    dropout_key: tuple[int, int] = (0, 0)


def target_logprobs(model: Model, works: Sequence[Work], recompute: str) -> list[Tensor]:
    """For each work the log-probabilities of its target tokens, [n] float32 in order, attached to one graph.

    Backward from them adds to the adapters' gradients.
    """
    sequences = [sequence for work in works for sequence in work.sequences]
    targets = [target for work in works for target in work.targets]
    tokens = [sum(map(len, work.sequences)) for work in works]
    keys = [work.dropout_key for work in works]
    counts = [sum(map(sum, work.targets)) for work in works]
    batch = PackedBatch.pack(sequences, model.device)
    lora = LoraBatch.make([work.adapter for work in works], tokens, train=True, dropout_keys=keys)
    hidden = model.hidden_states(batch, lora, recompute=recompute)
    wanted = torch.tensor([t for target in targets for t in target], dtype=torch.bool).nonzero().squeeze(1)
    wanted = wanted.to(model.device)
    logprobs = model.token_logprobs(hidden.index_select(0, wanted - 1), batch.token_ids[wanted])
    return list(logprobs.split(counts))


def forward_backward(
    model: Model, data: Sequence[Datum], token_budget: int, recompute: str = "none"
) -> list[DatumResult]:
    """Add the gradient of every datum's loss to its adapter's gradients; returns losses and log-probabilities.

    Any mix of adapters, sequences and losses. Calls accumulate until `optim_step`. Raises InputError naming the datum
    before anything is computed; where a callable loss fails, all gradients are as they were before the call.
    """
    plain = isinstance(data, Sequence) and not isinstance(data, str)
    require(plain, "data", data, "a list of Datum")
    for i, datum in enumerate(data):
        _check_datum(datum, f"data[{i}]", model)
    parts = list(chunks([len(datum.token_ids) for datum in data], token_budget))
    at_risk = len(parts) > 1 and any(callable(datum.loss) for datum in data)  # one chunk's losses precede its backward
    before = {datum.adapter: datum.adapter.grads for datum in data}
    if at_risk:
        before = {adapter: None if grads is None else grads.clone() for adapter, grads in before.items()}
    try:
        return [result for chunk in parts for result in _forward_backward(model, data, chunk, recompute)]
    except BaseException:
        for adapter, grads in before.items():
            if grads is None:
                adapter.stop_training()
            elif adapter.grads is not None and at_risk:
                adapter.grads.copy_(grads)
        raise


def _forward_backward(model: Model, data: Sequence[Datum], chunk: list[int], recompute: str) -> list[DatumResult]:
    """`forward_backward` of the data whose numbers are in chunk, in one pass."""
    by_adapter: dict[int, list[int]] = {}
    for i in chunk:
        by_adapter.setdefault(data[i].adapter.uid, []).append(i)
    works = []
    for members in by_adapter.values():
        adapter = data[members[0]].adapter
        adapter.start_training()
        sequences = [data[i].token_ids for i in members]
        works.append(Work(adapter, sequences, [[False, *[True] * (len(s) - 1)] for s in sequences]))
    logprobs: dict[int, Tensor] = {}
    for members, joined in zip(by_adapter.values(), target_logprobs(model, works, recompute), strict=True):
        logprobs |= zip(members, joined.split([len(data[i].token_ids) - 1 for i in members]), strict=True)
    losses = torch.stack([_loss(data[i], logprobs[i], f"data[{i}].loss") for i in chunk])
    losses.sum().backward()
    return [DatumResult(loss, logprobs[i].detach().cpu()) for i, loss in zip(chunk, losses.tolist(), strict=True)]


def optim_step(steps: Sequence[tuple[Adapter, AdamParams]]) -> list[float]:
    """One AdamW step of every adapter in the list, all at once; gradients start at zero again.

    Returns each adapter's gradient norm before clipping. An adapter whose norm is not finite stays as it is, but for
    its gradients. Raises InputError naming the entry: an adapter without gradients, or twice.
    """
    plain = isinstance(steps, Sequence) and not isinstance(steps, str)
    require(plain, "steps", steps, "a list of (Adapter, AdamParams)")
    seen: set[int] = set()
    for i, entry in enumerate(steps):
        pair = isinstance(entry, Sequence) and len(entry) == 2
        accepted = "(Adapter, AdamParams)"
        require(pair and isinstance(entry[0], Adapter), f"steps[{i}]", entry, accepted)
        require(isinstance(entry[1], AdamParams), f"steps[{i}]", entry, accepted)
        adapter, hyper = entry
        try:
            hyper.check()
        except InputError as error:
            raise InputError(f"steps[{i}].{error}") from None
        if adapter.grads is None:
            raise InputError(f"steps[{i}]: adapter {adapter.uid} has no gradients; call forward_backward first")
        if adapter.uid in seen:
            raise InputError(f"steps[{i}]: adapter {adapter.uid} is in the list twice")
        seen.add(adapter.uid)
    norms = _optim_step(steps).tolist() if steps else []
    for (adapter, _), norm in zip(steps, norms, strict=True):
        if not math.isfinite(norm):
            adapter.steps -= 1  # its moments have not moved
    return norms


def _optim_step(steps: Sequence[tuple[Adapter, AdamParams]]) -> Tensor:
    """`optim_step` without checks; the norms stay on the device."""
    params, grads, firsts, seconds = [], [], [], []
    for adapter, _ in steps:
        if adapter.grads is None or adapter.moments is None:
            raise InputError(f"adapter {adapter.uid} is not being trained")
        adapter.steps += 1
        adapter.version += 1
        params.append(adapter.params)
        grads.append(adapter.grads)
        firsts.append(adapter.moments[0])
        seconds.append(adapter.moments[1])
    hyper = Hyper(
        learning_rate=[h.learning_rate for _, h in steps],
        beta1=[h.betas[0] for _, h in steps],
        beta2=[h.betas[1] for _, h in steps],
        eps=[h.eps for _, h in steps],
        weight_decay=[h.weight_decay for _, h in steps],
        step=[adapter.steps for adapter, _ in steps],
        max_grad_norm=[h.max_grad_norm for _, h in steps],
    )
    return adamw_step(params, grads, firsts, seconds, hyper)


def _check_datum(datum: Datum, name: str, model: Model) -> None:
    require(isinstance(datum, Datum), name, datum, "a Datum")
    require(isinstance(datum.adapter, Adapter), f"{name}.adapter", datum.adapter, "an Adapter")
    datum.adapter.check_model(model.config, f"{name}.adapter")
    check_token_ids(integers(datum.token_ids, f"{name}.token_ids"), f"{name}.token_ids", model.config)
    n = len(datum.token_ids)
    require(
        n >= 2, f"{name}.token_ids", datum.token_ids, "at least two tokens: the second is the first that is predicted"
    )
    known = ("cross_entropy", "importance_sampling")
    require(
        callable(datum.loss) or datum.loss in known, f"{name}.loss", datum.loss, f"one of {list(known)} or a callable"
    )
    needed = {"old_logprobs", "advantages"} if datum.loss == "importance_sampling" else set()
    for field in ("weights", "old_logprobs", "advantages"):
        values = getattr(datum, field)
        if values is None:
            require(field not in needed, f"{name}.{field}", values, f"{n - 1} numbers")
            continue
        require(not callable(datum.loss), f"{name}.{field}", values, "None with a callable loss")
        try:
            column = torch.as_tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            column = torch.empty(())
        require(column.dim() == 1, f"{name}.{field}", values, f"{n} or {n - 1} numbers")
        require(len(column) in (n, n - 1), f"{name}.{field}", f"{len(column)} entries", f"{n} or {n - 1} numbers")
        require(bool(column.isfinite().all()), f"{name}.{field}", values, "finite numbers")


def _loss(datum: Datum, logprobs: Tensor, name: str) -> Tensor:
    """The datum's loss of its [n - 1] log-probabilities."""
    if callable(datum.loss):
        loss = datum.loss(logprobs)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            accepted = "a scalar tensor computed from the log-probabilities"
            raise InputError(f"{name}: the callable returned {loss!r:.80}; accepted: {accepted}")
        return loss.reshape(())

    def column(values: Sequence[float] | None) -> Tensor | None:
        if values is None:
            return None
        return torch.as_tensor(values, dtype=torch.float32).to(logprobs.device)[-len(logprobs) :]

    terms = -logprobs
    if datum.loss == "importance_sampling":
        old, advantages = column(datum.old_logprobs), column(datum.advantages)
        if old is not None and advantages is not None:
            terms = -advantages * (logprobs - old).exp()
    weights = column(datum.weights)
    return terms.mean() if weights is None else (weights * terms).sum()


def learning_rate(job: TrainJob, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`, as Hugging Face's schedules give it."""
    if step < job.warmup_steps:
        return job.learning_rate * step / job.warmup_steps
    if job.lr_scheduler == "constant":
        return job.learning_rate
    progress = (step - job.warmup_steps) / max(1, total - job.warmup_steps)
    if job.lr_scheduler == "cosine":
        return job.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return job.learning_rate * max(0.0, 1 - progress)


@dataclass(frozen=True)
class _Piece:
    """What one pass does for a job: some of the sequences of one of its optimizer steps."""

    members: list[int]
    weight: float  # of each target token: 1 / those of the whole optimizer step
    ends_step: bool


class _Run:
    """A job that is being trained."""

    def __init__(self, job_id: int, job: TrainJob, sequences: list[TrainSequence], adapter: Adapter, token_budget: int):
        self.job_id = job_id
        self.job = job
        self.ids = [list(sequence.token_ids) for sequence in sequences]
        self.targets = [_targets(sequence) for sequence in sequences]
        self.adapter = adapter
        self.token_budget = token_budget
        microbatches = -(-len(sequences) // job.batch_size)
        self.steps_an_epoch = -(-microbatches // job.gradient_accumulation_steps)
        self.total_steps = self.steps_an_epoch * job.num_epochs
        self.losses: list[float] = []
        self.step_loss = 0.0
        self.num_pieces = 0
        self.num_tokens = 0
        self.pieces = self._pieces()
        self.next = next(self.pieces, None)

    def _pieces(self) -> Iterator[_Piece]:
        """All pieces of the job in order. Depends on nothing but the job and the token budget."""
        job = self.job
        a_step = job.batch_size * job.gradient_accumulation_steps
        for epoch in range(job.num_epochs):
            order = list(range(len(self.ids)))
            if job.seed is not None:
                generator = torch.Generator().manual_seed((job.seed * 1_000_003 + epoch) % 2**63)
                order = torch.randperm(len(order), generator=generator).tolist()
            for first in range(0, len(order), a_step):
                members = order[first : first + a_step]
                count = sum(sum(self.targets[i]) for i in members)
                yield from self._cut(members, 1.0 / max(1, count))

    def _cut(self, members: list[int], weight: float) -> Iterator[_Piece]:
        """An optimizer step's sequences, by microbatches, and these by the token budget."""
        cuts: list[list[int]] = []
        for first in range(0, len(members), self.job.batch_size):
            micro = members[first : first + self.job.batch_size]
            cuts += [[micro[i] for i in cut] for cut in chunks([len(self.ids[i]) for i in micro], self.token_budget)]
        for cut in cuts[:-1]:
            yield _Piece(cut, weight, False)
        yield _Piece(cuts[-1], weight, True)

    def advance(self) -> None:
        """Move on to the next piece."""
        if self.next is not None:
            self.num_tokens += sum(len(self.ids[i]) for i in self.next.members)
        self.num_pieces += 1
        self.next = next(self.pieces, None)

    def adam(self) -> AdamParams:
        """The hyper-parameters of the optimizer step that is due."""
        job = self.job
        rate = learning_rate(job, self.adapter.steps, self.total_steps)
        return AdamParams(rate, job.betas, job.eps, job.weight_decay, job.max_grad_norm)


def _targets(sequence: TrainSequence) -> list[bool]:
    mask = sequence.loss_mask
    return [False] + ([True] * (len(sequence.token_ids) - 1) if mask is None else [bool(m) for m in mask[1:]])


class Trainer:
    """Runs jobs: `submit`, then `step` until `poll` gives a result; `cancel` at any time. Jobs join as others leave."""

    def __init__(
        self,
        model: Model,
        prepare: Callable[[TrainJob], list[TrainSequence]],
        token_budget: int,
        state_bytes: int | None = None,
        recompute: str = "none",
        callback: Callable[[int, int, float], None] | None = None,
    ):
        """prepare: a job's sequences as checked token ids. token_budget: tokens a pass. state_bytes: what parameters,
        gradients and moments of resident jobs may take (one job is always let in); None: no limit. callback(job_id,
        step, loss): after every optimizer step.
        """
        self.model = model
        self.prepare = prepare
        self.token_budget = token_budget
        self.state_bytes = state_bytes
        self.recompute = recompute
        self.callback = callback
        self.tokens_done = 0
        self._waiting: list[tuple[int, TrainJob]] = []
        self._resident: list[_Run] = []
        self._results: dict[int, TrainResult] = {}
        self._spare: list[Tensor] = []  # gradients and moments of jobs that have left, all of one size
        self._unread: list[tuple[list[_Run], list[_Run], Tensor, Tensor | None]] = []
        self._submitted = 0

    def submit(self, job: TrainJob) -> int:
        """Queue a job; returns its id. A job that cannot be trained fails alone: its result has an error."""
        job_id, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append((job_id, job))
        return job_id

    @property
    def busy(self) -> bool:
        """True while a job is waiting or resident."""
        return bool(self._waiting or self._resident or self._unread)

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
        run = next((run for run in self._resident if run.job_id == job_id), None)
        if run is None:
            self._results[job_id] = TrainResult(None, [], 0, "cancelled")
        else:
            self._fail(run, "cancelled")

    def step(self) -> None:
        """One pass: the next piece of as many jobs as fit the budget, and the optimizer steps now due.

        Jobs that are resident go first; waiting ones are let in only where a pass has room for them, as state that
        this pass does not touch takes memory (and on a CPU cache) for nothing.
        """
        self._read()
        chosen, tokens = [], 0
        for run in self._candidates():
            size = sum(len(run.ids[i]) for i in run.next.members) if run.next is not None else 0
            if chosen and tokens + size > self.token_budget:
                break
            if size:
                chosen.append(run)
                tokens += size
        if not chosen:
            return
        self._pass(chosen)
        self.tokens_done += tokens
        done = set(map(id, chosen))
        self._resident = [r for r in self._resident if id(r) not in done] + chosen  # those that waited go first
        if self.model.device.type == "cpu" or not any(run.next for run in self._resident):
            self._read()

    def _candidates(self) -> Iterator[_Run]:
        """Resident jobs, then waiting ones, each let in when it is asked for."""
        yield from list(self._resident)
        while (run := self._admit()) is not None:
            yield run

    def _pass(self, chosen: list[_Run]) -> None:
        works, weights = [], []
        for run in chosen:
            piece = run.next
            if piece is None:
                continue
            targets = [run.targets[i] for i in piece.members]
            key = (run.job.seed or 0, run.num_pieces)
            works.append(Work(run.adapter, [run.ids[i] for i in piece.members], targets, key))
            weights.append(piece.weight)
        logprobs = target_logprobs(self.model, works, self.recompute)
        losses = torch.stack([-own.sum() * weight for own, weight in zip(logprobs, weights, strict=True)])
        losses.sum().backward()
        stepping = [run for run in chosen if run.next is not None and run.next.ends_step]
        norms = _optim_step([(run.adapter, run.adam()) for run in stepping]) if stepping else None
        self._unread.append((chosen, stepping, losses.detach(), norms))
        for run in chosen:
            run.advance()

    def _read(self) -> None:
        """Take in the losses and norms of passes that have been made: on a GPU, while it works on the next."""
        unread, self._unread = self._unread, []
        for chosen, stepping, losses, norms in unread:
            for run, loss in zip(chosen, losses.tolist(), strict=True):
                run.step_loss += loss
            for run, norm in zip(stepping, norms.tolist() if norms is not None else [], strict=True):
                if run.job_id in self._results:
                    continue  # cancelled, or failed in an earlier pass
                loss, run.step_loss = run.step_loss, 0.0
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    what = "loss" if not math.isfinite(loss) else "gradient norm"
                    value = loss if not math.isfinite(loss) else norm
                    self._fail(run, f"step {len(run.losses)}: the {what} is {value}; the adapter diverged")
                    continue
                run.losses.append(loss)
                if self.callback is not None:
                    self.callback(run.job_id, len(run.losses), loss)
                    if run.job_id in self._results:
                        continue  # cancelled in the callback
                if run.next is None and len(run.losses) == run.total_steps:
                    self._finish(run)
                elif run.job.checkpoint_dir is not None and len(run.losses) % run.job.checkpoint_every == 0:
                    try:
                        save_checkpoint(run)
                    except InputError as error:
                        self._fail(run, str(error))

    def _finish(self, run: _Run) -> None:
        self._leave(run)
        self._results[run.job_id] = TrainResult(run.adapter, run.losses, len(run.losses), num_tokens=run.num_tokens)

    def _leave(self, run: _Run) -> None:
        """The job's gradients and moments become the next job's: fresh memory costs a CPU more than zeroing it does."""
        self._resident.remove(run)
        state = run.adapter.stop_training()
        if state is not None:
            self._spare.append(state)

    def _fail(self, run: _Run, error: str) -> None:
        self._leave(run)
        self._results[run.job_id] = TrainResult(None, run.losses, len(run.losses), error, run.num_tokens)

    def _admit(self) -> _Run | None:
        """Let in the next waiting job that can be trained; None if there is none or no memory for it."""
        while self._waiting:
            job_id, job = self._waiting[0]
            try:
                run = self._make_run(job_id, job)
            except InputError as error:
                self._waiting.pop(0)
                self._results[job_id] = TrainResult(None, [], 0, str(error))
                continue
            if run is not None:
                self._waiting.pop(0)
                self._resident.append(run)
            return run
        return None

    def _make_run(self, job_id: int, job: TrainJob) -> _Run | None:
        """The job, resident; None if its state does not fit now. Raises InputError for a job that cannot be trained."""
        if not isinstance(job, TrainJob):
            raise InputError(f"jobs: found {type(job).__name__}; accepted: a TrainJob")
        job.check()
        sequences = self.prepare(job)
        if job.init_from is not None:
            if not isinstance(job.init_from, Adapter):
                raise InputError(f"init_from: found {type(job.init_from).__name__}; accepted: an Adapter")
            job.init_from.check_model(self.model.config, "init_from")
            job = replace(job, lora=job.init_from.config)
        adapter = Adapter(self.model.config, job.lora, torch.device("meta"))  # its size, before memory is taken
        held = sum(4 * run.adapter.params.nbytes for run in self._resident)
        if self._resident and self.state_bytes is not None and held + 4 * adapter.params.nbytes > self.state_bytes:
            return None
        if job.init_from is not None:
            adapter = job.init_from.copy()
        else:
            adapter = Adapter.create(self.model.config, job.lora, self.model.device, job.seed or 0)
        if self._spare and self._spare[-1].shape[1] != adapter.layout.size:
            self._spare.clear()  # of another size: given back, so that memory stays within its bound
        adapter.start_training(self._spare.pop() if self._spare else None)
        run = _Run(job_id, job, sequences, adapter, self.token_budget)
        if job.checkpoint_dir is not None:
            load_checkpoint(run)
        return run


def _fingerprint(run: _Run) -> str:
    """What a checkpoint must match to be gone on from: everything that decides the job's numbers."""
    job, layout = run.job, run.adapter.layout
    fields: dict[str, Any] = {name: getattr(job, name) for name in job.__dataclass_fields__}
    for name in ("sequences", "init_from", "checkpoint_dir", "checkpoint_every", "lora"):
        del fields[name]
    fields |= {"ids": run.ids, "targets": run.targets, "budget": run.token_budget, "size": layout.size}
    fields |= {"ranks": layout.ranks.tolist(), "scales": layout.scales.tolist(), "dropout": job.lora.lora_dropout}
    if job.init_from is not None:
        fields["init"] = hashlib.sha256(job.init_from.params.cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def save_checkpoint(run: _Run) -> None:
    """Parameters, moments, losses and the place in the job, in one file that is replaced whole."""
    if run.adapter.moments is None or run.job.checkpoint_dir is None:
        return
    directory = Path(run.job.checkpoint_dir)
    tensors = {
        "params": run.adapter.params.cpu(),
        "exp_avg": run.adapter.moments[0].cpu(),
        "exp_avg_sq": run.adapter.moments[1].cpu(),
        "losses": torch.tensor(run.losses, dtype=torch.float64),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / "checkpoint.safetensors.partial"
        save_file(tensors, partial, metadata={"fingerprint": _fingerprint(run)})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())  # a power cut must not leave the new name on an empty file
        os.replace(partial, directory / "checkpoint.safetensors")
    except OSError as error:
        raise InputError(f"checkpoint_dir: {directory}: cannot be written: {error}") from None


def load_checkpoint(run: _Run) -> None:
    """Go on from the job's checkpoint if there is one. Raises InputError if it is broken or another job's."""
    file = Path(run.job.checkpoint_dir or ".") / "checkpoint.safetensors"
    if not file.exists() or run.adapter.moments is None:
        return
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("fingerprint") != _fingerprint(run):
                raise InputError(
                    f"{file}: a checkpoint of another job; accepted: one of this job, or an empty directory"
                )
            run.adapter.params.copy_(stored.get_tensor("params"))
            run.adapter.moments[0].copy_(stored.get_tensor("exp_avg"))
            run.adapter.moments[1].copy_(stored.get_tensor("exp_avg_sq"))
            run.losses = stored.get_tensor("losses").tolist()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable checkpoint: {error}") from None
    run.adapter.steps = len(run.losses)
    steps = 0
    while steps < len(run.losses) and run.next is not None:
        steps += run.next.ends_step
        run.advance()
