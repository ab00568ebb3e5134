"""Engine: owns the model and the tokenizer, trains adapters and scores sequences under them.

Sequences go through the model packed end to end, up to a token budget at a time.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import count, groupby
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from seal_engine.files import show
from seal_engine.inputs import Inputs, broadcast
from seal_engine.model.adapter_layout import AdapterLayout, adapter_layout
from seal_engine.model.adapters import Adapter
from seal_engine.model.checkpoint import load_model, reload_model, save_model
from seal_engine.model.config import ModelConfig
from seal_engine.model.devices import free_memory, on_device, parse_device, parse_dtype, parse_path, total_memory
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.peft_config import read_peft_config
from seal_engine.model.pretrained import open_pretrained
from seal_engine.model.quantize import parse_quantize
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.model.transformer import Model
from seal_engine.plan import RECOMPUTE, Plan, make_plan, training_memory
from seal_engine.progress import reporting
from seal_engine.sampling.decode_cache import DecodeCache
from seal_engine.sampling.kv_cache import KVCache
from seal_engine.sampling.requests import Delta, RequestOutput, SamplingParams, read_sampling_defaults
from seal_engine.sampling.sampler import Sampler
from seal_engine.training.jobs import AdamParams, Datum, DatumResult, TrainJob, TrainResult, min_sequential_steps
from seal_engine.training.trainer import Trainer
from seal_engine.training.verbs import forward, forward_backward, optim_step
from seal_engine.types import InputError, LoraConfig, PackedBatch, chunks, is_integer, require
from seal_kernels.dispatch import ceil_div

TOKEN_BUDGET = 8192  # tokens in one forward pass: enough to fill a GPU, few enough for any activation memory
CPU_TOKEN_BUDGET = 2048  # in training: a CPU's matrix products are no faster with more, and activations stay small
CPU_SAMPLER_TOKENS = 512  # in a sampler's step: as many as products with packed matrices take, and all stays in caches
MAX_NUM_SEQS = 256  # completions sampled at once


class Engine:
    """A checkpoint, ready to run. Build it with `Engine.from_pretrained`."""

    def __init__(
        self,
        model: Model,
        directory: Path | None = None,
        tokenizer: Tokenizer | None = None,
        deterministic: bool = False,
    ):
        """directory: the checkpoint that tokenizer files come from, or a GGUF file; tokenizer: in place of its own."""
        self.model = model
        self.directory = directory
        self.pretrained = None if directory is None else open_pretrained(directory)
        if deterministic:
            model.batch_invariant = True
        this = weakref.proxy(self)  # a strong reference would keep the weights of an engine that is dropped
        self.inputs = Inputs(
            model.config, lambda: this.tokenizer, lambda: this.end_token_id, lambda: this.stop_token_ids
        )
        self._seeds = count(2**63)  # of requests without one: beyond those that a request may have
        if tokenizer is not None:
            self.tokenizer = tokenizer

    @staticmethod
    def from_pretrained(
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        deterministic: bool = False,
        quantize: str | None = None,
        pack_weights: bool | None = None,
    ) -> "Engine":
        """Load a checkpoint (Llama 2/3, Mistral, Qwen2/2.5, Qwen3): a Hugging Face directory or a GGUF file.

        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1" or a torch.device.
        dtype: "auto" (as the checkpoint says), "float32", "float16", "bfloat16" or a torch.dtype: of the parameters. A
        GGUF file's quantised tensors become float32 where it is "auto".
        On a CPU, sums are float32 whatever the parameters are; see `Model.product_dtype`.
        quantize: "int8" (a scale per output) or "nf4" (blocks of 64): of the linears, while they are loaded; the base
        can then be trained on and sampled from, not merged into or saved. FP8 and bitsandbytes' NF4 stay as stored.
        deterministic: an adapter trained alone and among any others comes out the same bit for bit (on a CPU), not
        only to float32 rounding.
        pack_weights: on a CPU, whether products may use packed copies of the large matrices, which are faster for few
        rows and take as much memory again (on AMD in float32 for all rows, and twice as much, the second time for
        training); `plan` counts them. None: if they take at most a quarter of what is free.
        Raises InputError (a ValueError) naming the file and field for anything that cannot be loaded.
        """
        path = parse_path(path)
        require(pack_weights is None or isinstance(pack_weights, bool), "pack_weights", pack_weights, "a bool or None")
        model = load_model(path, parse_dtype(dtype), parse_device(device), parse_quantize(quantize))
        if pack_weights is None:
            pack_weights = model.packed_bytes <= free_memory(model.device) // 4
        if pack_weights:
            model.allow_packing()
        engine = Engine(model, path, deterministic=deterministic)
        if engine.has_tokenizer:
            _ = engine.tokenizer  # a broken tokenizer is refused now; a missing one when text is first used
        return engine

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's configuration."""
        return self.model.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises InputError if it has none: token ids work without."""
        if self.pretrained is None:
            raise InputError("this engine was built without a tokenizer; accepted: sequences of token ids")
        return self.pretrained.read_tokenizer()

    @torch.no_grad()
    def logits(
        self, sequences: Sequence[str | Sequence[int]], adapters: Sequence[Adapter | None] | Adapter | None = None
    ) -> list[Tensor]:
        """For each sequence, text or token ids, its next-token logits: [num_tokens, V] float32, on the device.

        adapters: one for each sequence (None: the base), or one for all. A batch of long sequences over a large
        vocabulary is large: 4 V bytes a token. `score` needs no such memory. Raises InputError naming the sequence:
        empty, longer than the model, ids outside the vocabulary.
        """
        results: dict[int, Tensor] = {}
        for members, batch, lora in self._batches(self.inputs.sequences(sequences), adapters):
            logits = self.model.logits(self.model.hidden_states(batch, lora))
            results |= dict(zip(members, logits.split(batch.lengths), strict=True))
        return [results[i] for i in range(len(results))]

    @torch.no_grad()
    def score(
        self, sequences: Sequence[str | Sequence[int]], adapters: Sequence[Adapter | None] | Adapter | None = None
    ) -> list[Tensor]:
        """For each sequence of n tokens, text or ids, [n - 1] float32: log p(token i+1 | tokens 0 .. i), on the CPU.

        Equals log-softmax of `logits`, without holding them. Takes and raises what `logits` does.
        """
        results: dict[int, Tensor] = {}
        for members, batch, lora in self._batches(self.inputs.sequences(sequences), adapters):
            hidden = self.model.hidden_states(batch, lora)
            predicts = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            predicts[batch.cu_seqlens[1:].long() - 1] = False  # a last token predicts nothing that is known
            rows = predicts.nonzero().squeeze(1)
            logprobs = self.model.token_logprobs(hidden[rows], batch.token_ids[rows + 1]).cpu()
            results |= dict(zip(members, logprobs.split([n - 1 for n in batch.lengths]), strict=True))
        return [results[i] for i in range(len(results))]

    def create_adapter(self, lora: LoraConfig, seed: int = 0) -> Adapter:
        """A new adapter on this engine's device: A as PEFT draws it, B zero. Raises InputError for a bad config."""
        return Adapter.create(self.config, lora, self.model.device, seed)

    def load_adapter(
        self, source: str | Path | Mapping[str, Tensor], config: LoraConfig | Mapping[str, Any] | None = None
    ) -> Adapter:
        """An adapter in PEFT's format: a directory (`Adapter.save` writes it), or tensors by PEFT's names and a config.

        config: beside tensors, a LoraConfig or what adapter_config.json holds. Raises InputError naming the file or
        argument, and the field or tensor.
        """
        if not isinstance(source, Mapping):
            require(config is None, "config", config, "none beside a directory, which has its own")
            return Adapter.load(parse_path(source), self.config, self.model.device)
        if isinstance(config, Mapping):
            config = read_peft_config(config, self.config, "config")
        if not isinstance(config, LoraConfig):
            raise InputError(f"config: found {show(config)}; accepted: a LoraConfig, or a dict of PEFT's fields")
        return Adapter.from_tensors(source, config, self.config, self.model.device)

    @torch.no_grad()
    def merge(self, adapter: Adapter) -> None:
        """Add the adapter to the base for good: W += scale (A^T B)^T, in float32, then in the base's dtype.

        Raises InputError, before anything is changed, where a weight would not be finite, and for a quantised base.
        """
        if self.model.quantization is not None:
            found = f"a base quantised to {self.model.quantization.kind}"
            raise InputError(f"merge: found {found}; accepted: one in floats; here an update stays an adapter")
        if not isinstance(adapter, Adapter):
            raise InputError(f"adapter: found {show(adapter)}; accepted: an Adapter")
        adapter.check_model(self.config, "adapter")
        views = dict(self.model.named_tensors())

        def merged(name: str, a: Tensor, b: Tensor, scale: float) -> Tensor:
            return torch.addmm(views[f"{name}.weight"].float(), b.T, a, alpha=scale).to(self.model.dtype)

        for projection in adapter.projections_with_scales():
            if not merged(*projection).isfinite().all():
                name = projection[0]
                raise InputError(f"adapter: {name}: merged, its weight is NaN or infinite; accepted: finite sums")
        for projection in adapter.projections_with_scales():
            views[f"{projection[0]}.weight"].copy_(merged(*projection))
        self.model.version += 1

    @torch.no_grad()
    def reload(self) -> None:
        """Read the checkpoint's weights again, undoing every merge. InputError for an engine without a directory."""
        if self.directory is None:
            raise InputError("this engine was built without a directory to read its weights from again")
        reload_model(self.model, self.directory)

    def forward_backward(self, data: Sequence[Datum]) -> list[DatumResult]:
        """Add each datum's gradient to its adapter's; see `training.verbs.forward_backward`."""
        with on_device(self.model.device):
            return forward_backward(self.model, data, self.token_budget)

    def forward(self, data: Sequence[Datum]) -> list[DatumResult]:
        """The losses and log-probabilities of `forward_backward`, and no gradient."""
        with on_device(self.model.device):
            return forward(self.model, data, self.token_budget)

    def optim_step(self, steps: Sequence[tuple[Adapter, AdamParams]]) -> list[float]:
        """One AdamW step of each adapter, all at once; returns gradient norms. See `training.verbs.optim_step`."""
        with on_device(self.model.device):
            return optim_step(steps)

    def trainer(
        self,
        token_budget: int | None = None,
        recompute: str = "auto",
        callback: Callable[[int, int, float], None] | None = None,
        memory_bytes: int | None = None,
        layouts: Sequence[AdapterLayout] = (),
    ) -> Trainer:
        """A Trainer over this engine's model: submit jobs, step, poll.

        token_budget: tokens a pass; None: TOKEN_BUDGET, on a CPU CPU_TOKEN_BUDGET. recompute: "none", "mlp",
        "layer", or "auto": as little as leaves half of the memory to adapters, and nothing in small passes.
        memory_bytes: what may be used beside the weights; None: what is free. layouts: of the adapters that will be
        trained; none: of any.
        """
        require(recompute in ("auto", *RECOMPUTE), "recompute", recompute, f"one of {['auto', *RECOMPUTE]}")
        budget = self.token_budget if token_budget is None else token_budget
        require(is_integer(budget) and budget >= 1, "token_budget", token_budget, "an integer >= 1")
        free = free_memory(self.model.device) if memory_bytes is None else memory_bytes
        element_size = self.model.compute_dtype.itemsize
        cpu = self.model.device.type == "cpu"
        memory = training_memory(self.config, budget, element_size, free, recompute, cpu, layouts)
        return Trainer(self.model, self.inputs.train_sequences, budget, callback=callback, **memory._asdict())

    def train(
        self,
        jobs: Sequence[TrainJob],
        callback: Callable[[int, int, float], None] | None = None,
        progress: bool = True,
        **options: Any,
    ) -> list[TrainResult]:
        """Train all jobs at once, each its own adapter; results in job order.

        A job that cannot be trained or that diverges fails alone: its result has an error and no adapter.
        callback(job number, step, loss) after every optimizer step. progress: a bar over jobs and tokens, if it takes
        over a second. options: as of `trainer`.
        """
        if not isinstance(jobs, Sequence) or isinstance(jobs, str):
            raise InputError(f"jobs: found {show(jobs)}; accepted: a list of TrainJob")
        # The longest first: begun last, they would be left to train alone.
        order = sorted(range(len(jobs)), key=lambda i: -min_sequential_steps(jobs[i]))
        report = callback and (lambda job_id, step, loss: callback(order[job_id], step, loss))
        trainer = self.trainer(callback=report, layouts=self._layouts(jobs), **options)
        ids = dict(zip(order, [trainer.submit(jobs[i]) for i in order], strict=True))
        _run_to_end(trainer, len(jobs), "job", "Training", progress)
        return [trainer.result(ids[i]) for i in range(len(jobs))]

    def _layouts(self, jobs: Sequence[TrainJob]) -> list[AdapterLayout]:
        """The layouts of the jobs' adapters, each once; a job that cannot be trained has none."""
        layouts = {}
        for job in jobs:
            with suppress(InputError, AttributeError):
                layout = adapter_layout(self.config, job.lora if job.init_from is None else job.init_from.config)
                layouts[id(layout)] = layout  # adapter_layout returns one object for equal arguments
        return list(layouts.values())

    @property
    def has_tokenizer(self) -> bool:
        """Whether text works: token ids always do."""
        given = "tokenizer" in self.__dict__
        return given or (self.pretrained is not None and self.pretrained.has_tokenizer)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: the tokenizer's or, without one, those that the checkpoint's configs name."""
        if self.has_tokenizer:
            return self.tokenizer.stop_token_ids
        return () if self.pretrained is None else self.pretrained.stop_token_ids

    @property
    def end_token_id(self) -> int | None:
        """The id that training teaches as the end of a sequence, one of `stop_token_ids`; None: there is none."""
        own = self.tokenizer.eos_token_id if self.has_tokenizer else None
        return own if own is not None else next(iter(self.stop_token_ids), None)

    def sampling_defaults(self) -> dict[str, Any]:
        """What the checkpoint's generation_config.json says of sampling, as fields of SamplingParams.

        Without do_sample that is greedy decoding, as in Transformers. InputError for a setting that is not supported.
        """
        if self.pretrained is None:
            return {}
        return read_sampling_defaults(*self.pretrained.generation_config())

    def sampler(self, num_blocks: int | None = None, stream: bool = False, max_num_seqs: int = MAX_NUM_SEQS) -> Sampler:
        """A Sampler over this engine's model with a K/V cache of its own: add requests, step, poll.

        num_blocks: of 16 tokens; None: as many as half of the free memory holds. stream: deltas carry text.
        max_num_seqs: completions that are worked on at once.
        """
        require(is_integer(max_num_seqs) and max_num_seqs >= 1, "max_num_seqs", max_num_seqs, "an integer >= 1")
        model, dtype = self.model, self.model.product_dtype
        if num_blocks is None:
            num_blocks = max(1, free_memory(model.device) // 2 // KVCache.block_bytes(self.config, dtype))
        cache = KVCache(self.config, num_blocks, dtype, model.device)
        return Sampler(
            model,
            cache,
            partial(self.tokenizer.decode, skip_special_tokens=True, skip_unknown=True) if self.has_tokenizer else None,
            self.stop_token_ids,
            CPU_SAMPLER_TOKENS if model.device.type == "cpu" else TOKEN_BUDGET,
            self._seeds,
            max_num_seqs,
            stream,
            self.tokenizer.special_tokens if self.has_tokenizer else None,
            DecodeCache.make(model, cache),
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[Adapter | None] | Adapter | None = None,
        progress: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Continue all prompts, texts or token ids, at once; outputs in their order.

        params and adapters: one for each prompt, or one for all. A prompt that cannot be run fails alone: its output
        has an error. progress: a bar over prompts and tokens, if it takes over a second. options: as of `sampler`.
        """
        sampler, ids = self._submit(prompts, params, adapters, options)
        _run_to_end(sampler, len(ids), "prompt", "Sampling", progress)
        return [sampler.output(request_id) for request_id in ids]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: Sequence[Adapter | None] | Adapter | None = None,
        **options: Any,
    ) -> Iterator[Delta]:
        """`generate`, token by token: what each step adds to which prompt's (request_id) which completion (index).

        Raises InputError, before anything is sampled, for the first prompt that cannot be run.
        """
        sampler, ids = self._submit(prompts, params, adapters, {**options, "stream": True})
        for request_id in ids:
            error = sampler.output(request_id).error
            if error is not None:
                raise InputError(f"prompts[{request_id}]: {error}")
        return _deltas(sampler)

    def _submit(self, prompts: Any, params: Any, adapters: Any, options: dict[str, Any]) -> tuple[Sampler, list[int]]:
        """A sampler with a request for each prompt, its cache as large as they need and memory allows."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InputError(f"prompts: found {show(prompts)}; accepted: a list of texts or token id lists")
        params = SamplingParams() if params is None else params
        wanted = broadcast(params, len(prompts), SamplingParams, "params", "a SamplingParams")
        adapters = broadcast(adapters, len(prompts), Adapter | None, "adapters", "an Adapter or None")
        token_ids: list[list[int] | InputError] = []
        max_num_seqs = options.get("max_num_seqs", MAX_NUM_SEQS)
        require(is_integer(max_num_seqs) and max_num_seqs >= 1, "max_num_seqs", max_num_seqs, "an integer >= 1")
        for prompt in prompts:
            try:
                token_ids.append(self.inputs.token_ids(prompt, "prompt"))
            except InputError as error:
                token_ids.append(error)
        if options.get("num_blocks") is None:
            longest = self.config.max_position_embeddings
            needs = [0]
            for ids, own in zip(token_ids, wanted, strict=True):
                tokens = min(longest, len(ids) + (own.max_tokens or longest)) if isinstance(ids, list) else 0
                needs += [ceil_div(tokens, 16)] * min(own.n, max_num_seqs)
            room = free_memory(self.model.device) // 2 // KVCache.block_bytes(self.config, self.model.product_dtype)
            options = {**options, "num_blocks": max(1, min(sum(sorted(needs)[-max_num_seqs:]), room))}
        sampler = self.sampler(**options)
        submitted = []
        for prompt, ids, own, adapter in zip(prompts, token_ids, wanted, adapters, strict=True):
            text = prompt if isinstance(prompt, str) else None
            submitted.append(sampler.add_request(text, ids, own, adapter))
        return sampler, submitted

    def plan(self, lora: LoraConfig, sequence_tokens: int, memory_bytes: int | None = None, **options: Any) -> Plan:
        """What fits and how long a step should take; see `plan.make_plan`. memory_bytes None: this device's."""
        cpu = self.model.device.type == "cpu"
        memory = memory_bytes or total_memory(self.model.device)
        options = {"dtype": self.model.dtype, "quantization": self.model.quantization, "cpu": cpu, **options}
        return make_plan(self.config, lora, memory, sequence_tokens, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model, its config and its tokenizer files so that Transformers and this engine load them.

        directory must be new or empty (InputError); it appears complete or not at all.
        """
        companions = None if self.pretrained is None else self.pretrained.write_companions
        save_model(self.model, parse_path(directory), companions)

    @property
    def token_budget(self) -> int:
        """Tokens in one training pass."""
        return CPU_TOKEN_BUDGET if self.model.device.type == "cpu" else TOKEN_BUDGET

    def _batches(
        self, sequences: list[list[int]], adapters: Sequence[Adapter | None] | Adapter | None
    ) -> Iterator[tuple[list[int], PackedBatch, LoraBatch | None]]:
        """(numbers of sequences, those packed, their adapters), as many at a time as fit TOKEN_BUDGET, at least one.

        Sequences of one adapter lie together.
        """
        adapters = broadcast(adapters, len(sequences), Adapter | None, "adapters", "an Adapter or None")
        for i, adapter in enumerate(adapters):
            if adapter is not None:
                adapter.check_model(self.config, f"adapters[{i}]")
        order = sorted(range(len(sequences)), key=lambda i: getattr(adapters[i], "uid", 0))
        with on_device(self.model.device):
            for chunk in chunks([len(sequences[i]) for i in order], TOKEN_BUDGET):
                members = [order[k] for k in chunk]
                batch = PackedBatch.pack([sequences[i] for i in members], self.model.device)
                segments = [list(group) for _, group in groupby(members, key=lambda i: adapters[i])]
                tokens = [sum(len(sequences[i]) for i in segment) for segment in segments]
                yield members, batch, LoraBatch.make([adapters[segment[0]] for segment in segments], tokens)


def _run_to_end(worker: Trainer | Sampler, count: int, unit: str, title: str, progress: bool) -> None:
    """Step until all is done, reporting progress."""
    start = perf_counter()
    with reporting(count, unit, title, progress) as report:
        while worker.busy:
            worker.step()
            rate = worker.tokens_done / (perf_counter() - start)
            report(worker.num_done, f"{worker.num_resident} resident, {rate:,.0f} tokens/s")


def _deltas(sampler: Sampler) -> Iterator[Delta]:
    """Step until all is done."""
    while sampler.busy:
        yield from sampler.step()
