"""Greedy sampling at equal batch sizes, beside Transformers' generate on the same checkpoint in the same run.

Prompts of 32 random tokens and answers of 32, so that no side pads. Answers are checked before anything is timed.
"""

import pytest
import torch

import measure
from bench_sample import generate_padded
from bench_train import load_base
from greedy import check_answers
from seal_engine import Engine, SamplingParams
from shapes import random_model

TOKENS = 32
GPU = measure.DEVICE.type == "cuda"
SHAPES = ["qwen2.5-7b"] if GPU else ["97m", "smollm2-135m"]
DTYPES = [torch.bfloat16] if GPU else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 8, 32, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(benchmark, record, tmp_path, shape, dtype, rows):
    saved = Engine(random_model(shape, dtype, measure.DEVICE))
    reference = load_base(saved, tmp_path / "base")
    engine = Engine.from_pretrained(tmp_path / "base", measure.DEVICE, dtype)
    vocab_size = engine.config.vocab_size
    prompts = torch.randint(vocab_size, (rows, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)

    def ours():
        outs = engine.generate(prompts, params, progress=False)
        return [out.outputs[0].token_ids for out in outs]

    @torch.no_grad()
    def theirs():
        return generate_padded(reference, prompts, TOKENS, min_new_tokens=TOKENS)

    check_answers(reference, prompts, ours(), theirs(), least=0.9)
    times = measure.side_by_side(benchmark, [theirs, ours], rounds=3 if rows < 256 else 2)
    for who, seconds in zip(("transformers", "seal_engine"), times, strict=True):
        record(
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            who=who,
            rows=rows,
            tokens_per_s=rows * TOKENS / seconds,
            times_faster=times[0] / seconds,
        )
