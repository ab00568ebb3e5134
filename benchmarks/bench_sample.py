"""Sampling many prompts at once, beside Transformers `generate` on padded batches and PEFT switching adapters.

Prompts of 10 to 400 random tokens, answers of 1 to 64, greedy. Transformers pads a batch's prompts on the left and goes
on until its longest answer is there; prompts are sorted by length for it, and the fastest of its batch sizes counts.
Only tokens that were asked for count. With adapters, PEFT takes one adapter's prompts at a time, as one batch; on a
GPU it is asked for every fourth adapter's, as these cost alike. Both sides' tokens are compared first: there is no
figure for a wrong result.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch

import measure
from bench_train import load_base
from greedy import check_answers
from seal_engine import Adapter, Engine, LoraConfig, SamplingParams
from shapes import random_model

GPU = measure.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
QV = LoraConfig(r=32, lora_alpha=64, target_modules=("q_proj", "v_proj"))
# (shape, dtype, requests, Transformers' batch sizes)
CASES = [("2m", torch.float32, 256, (16, 64)), ("97m", torch.bfloat16, 256, (16, 64))]
if GPU:
    CASES = [("qwen2.5-7b", torch.bfloat16, 256, (64,))]
ASKED = slice(None, None, 4 if GPU else 1)  # of the adapters, for PEFT


def requests(count: int, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts, and how many tokens to answer with."""
    generator = torch.Generator().manual_seed(0)
    lengths = (10 + torch.randint(391, (count,), generator=generator)).tolist()
    answers = (1 + torch.randint(64, (count,), generator=generator)).tolist()
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return prompts, [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in answers]


def make_adapters(engine: Engine, count: int) -> list[Adapter]:
    """Adapters that change what is sampled: B is random, not zero."""
    adapters = [engine.create_adapter(QV, seed=i) for i in range(count)]
    for i, adapter in enumerate(adapters):
        generator = torch.Generator(measure.DEVICE).manual_seed(i)
        for _, _, b in adapter.projections():
            b.normal_(std=0.02, generator=generator)
    return adapters


def generate_padded(model: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """`tokens` tokens for each prompt by Transformers' generate, as one batch padded on the left; greedy by default."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=measure.DEVICE)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=measure.DEVICE)
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()


class Padded:
    """Transformers' generate on left-padded batches; with adapters, PEFT's."""

    def __init__(self, engine: Engine, adapters: list[Adapter], directory):
        from peft import PeftModel

        self.model = load_base(engine, directory / "base")
        for i, adapter in enumerate(adapters):
            adapter.save(directory / f"adapter{i}")
            if i == 0:
                self.model = PeftModel.from_pretrained(self.model, directory / "adapter0", adapter_name="0")
            else:
                self.model.load_adapter(directory / f"adapter{i}", adapter_name=str(i))
        self.model.eval()

    def all(self, prompts: list[list[int]], answers: list[int], size: int) -> list[list[int]]:
        """The answers, in batches of `size` prompts of similar length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, list[int]] = {}
        for first, last in pairwise([*range(0, len(order), size), len(order)]):
            members = order[first:last]
            outs = generate_padded(self.model, [prompts[i] for i in members], max(answers[i] for i in members))
            found |= {i: out[: answers[i]] for i, out in zip(members, outs, strict=True)}
        return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize(("shape", "dtype", "count", "sizes"), CASES, ids=str)
@torch.no_grad()
def test_generate(benchmark, record, tmp_path, shape, dtype, count, sizes):
    """The base alone, and 32 adapters over the same requests."""
    engine = Engine(random_model(shape, dtype, measure.DEVICE))
    prompts, params = requests(count, engine.config.vocab_size)
    answers = [own.max_tokens or 0 for own in params]
    adapters = make_adapters(engine, min(32, count // 4))
    owners = [adapters[i % len(adapters)] for i in range(count)]

    def ours(owners: Any = None) -> list[list[int]]:
        outs = engine.generate(prompts, params, owners, progress=False)
        return [out.outputs[0].token_ids for out in outs]

    base = Padded(engine, [], tmp_path / "a")
    fns = [ours, *(lambda size=size: base.all(prompts, answers, size) for size in sizes)]
    check_answers(base.model, prompts, ours(), base.all(prompts, answers, sizes[0]))
    switching = Padded(engine, adapters, tmp_path / "b")

    asked = [range(i, count, len(adapters)) for i in range(len(adapters))[ASKED]]  # requests of each adapter

    def theirs() -> list[list[int]]:
        found: list[list[int]] = []
        for members in asked:
            switching.model.set_adapter(str(members[0]))
            found += switching.all([prompts[k] for k in members], [answers[k] for k in members], len(members))
        return found

    outs = ours(owners)
    order = [k for members in asked for k in members]
    use_adapter = lambda i: switching.model.set_adapter(str(order[i] % len(adapters)))  # noqa: E731
    check_answers(
        switching.model, [prompts[k] for k in order], [outs[k] for k in order], theirs(), use_adapter=use_adapter
    )
    times = measure.side_by_side(benchmark, [*fns, lambda: ours(owners), theirs], rounds=2 if shape == "2m" else 1)
    tokens = sum(answers)
    times[-1] *= tokens / sum(answers[k] for members in asked for k in members)  # of all adapters, at this rate
    names = ["seal_engine", *(f"transformers, batches of {size}" for size in sizes), "seal_engine", "peft, switching"]
    best = min(times[1 : 1 + len(sizes)])
    for i, (who, seconds) in enumerate(zip(names, times, strict=True)):
        with_adapters = i > len(sizes)
        record(
            shape=shape, dtype=str(dtype).removeprefix("torch."), requests=count, who=who,
            adapters=len(adapters) if with_adapters else 0, tokens_per_s=tokens / seconds,
            seal_engine_times_faster=seconds / times[-2] if with_adapters else seconds / times[0],
            than_the_best_of_the_baseline=times[-1] / times[-2] if with_adapters else best / times[0],
        )  # fmt: skip


@pytest.mark.parametrize("shape", ["qwen2.5-7b"] if GPU else ["2m", "97m"])
def test_cost_of_adapters(benchmark, record, shape):
    """64 requests of 32 tokens, 32 more each: none adapted, or by 1, 8 or 64 distinct adapters; in turns."""
    engine = Engine(random_model(shape, DTYPE, measure.DEVICE))
    prompts, _ = requests(64, engine.config.vocab_size)
    prompts = [(prompt * 4)[:32] for prompt in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    adapters = make_adapters(engine, 64)
    counts = (0, 1, 8, 64)

    def run(count: int) -> None:
        owners = [adapters[i % count] if count else None for i in range(len(prompts))]
        engine.generate(prompts, params, owners, progress=False)

    times = measure.side_by_side(benchmark, [lambda count=count: run(count) for count in counts], rounds=3)
    for count, seconds in zip(counts, times, strict=True):
        record(
            shape=shape, dtype=str(DTYPE).removeprefix("torch."), requests=len(prompts), who="seal_engine",
            adapters=count, tokens_per_s=len(prompts) * 32 / seconds, percent_on_top=100 * (seconds / times[0] - 1),
        )  # fmt: skip


def test_samples_of_one_prompt(benchmark, record):
    """8 samples of a 400-token prompt: it is computed once."""
    shape = "qwen2.5-7b" if GPU else "2m"
    engine = Engine(random_model(shape, DTYPE, measure.DEVICE))
    prompt = torch.randint(engine.config.vocab_size, (400,), generator=torch.Generator().manual_seed(0)).tolist()

    def run(n: int, copies: int) -> int:
        sampler = engine.sampler(num_blocks=1000)
        for _ in range(copies):
            sampler.add_request(None, prompt, SamplingParams(n=n, max_tokens=16, ignore_eos=True))
            if copies > 1:  # as if they had nothing in common
                prompt[0] = (prompt[0] + 1) % engine.config.vocab_size
        while sampler.busy:
            sampler.step()
        return sampler.tokens_computed

    computed = run(8, 1), run(1, 8)
    assert computed == (400 + 8 * 15, 8 * (400 + 15)), computed
    times = measure.side_by_side(benchmark, [lambda: run(8, 1), lambda: run(1, 8)], rounds=3)
    for who, tokens, seconds in zip(("n = 8", "8 different prompts"), computed, times, strict=True):
        record(shape=shape, who=who, tokens_computed=tokens, tokens_per_s=8 * 16 / seconds)
