"""Quantised bases: what is multiplied is what was stored, and all that runs on a base in floats runs on them."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import embedding_gradients

import oracle
from compare import relative_error
from gguf_files import write_gguf
from seal_engine import Engine, InputError, LoraConfig, SamplingParams, TrainJob
from seal_engine.cli.main import main
from seal_engine.model.quantize import FORMATS, encode, is_linear
from seal_engine.plan import weights_bytes
from seal_engine.tiny import MODEL
from seal_kernels.quantized_linear import NF4, QuantizedWeight

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEARS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
BATCH = oracle.sequences([1, 40, 2, 17])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bfloat16 checkpoint whose matrices have rows of whole blocks."""
    return oracle.save(oracle.make_model("llama", **SIZES).bfloat16(), tmp_path_factory.mktemp("model") / "saved")


def dequantized(engine: Engine) -> dict[str, torch.Tensor]:
    """Each parameter as its products see it."""
    named = engine.model.named_tensors()
    return {name: w.dequantize() if isinstance(w, QuantizedWeight) else w for name, w in named}


def transformers_with(engine: Engine, directory: Path, dtype: torch.dtype):
    """Transformers' model with the numbers that the engine's codes stand for."""
    model = oracle.load(directory, dtype)
    missing = model.load_state_dict({k: v.to(dtype) for k, v in dequantized(engine).items()}, strict=False)
    assert not missing.unexpected_keys
    return model


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-biases-window"])
def test_logits_and_gradients_are_those_of_the_dequantised_weights(name, quantize, tmp_path):
    """Truth: Transformers in float64 with the weights that the codes stand for. Rows need not be whole blocks."""
    directory = oracle.save(oracle.make_model(name), tmp_path / "model")
    engine = Engine.from_pretrained(directory, device="cpu", quantize=quantize)
    theirs = transformers_with(engine, directory, torch.float64)
    for ours, truth in zip(engine.logits(BATCH), oracle.logits(theirs, BATCH), strict=True):
        assert relative_error(ours, truth) < 1e-5
    assert relative_error(embedding_gradients(engine, BATCH), oracle.embedding_gradients(theirs, BATCH)) < 1e-5


def test_embeddings_norms_and_head_stay_as_they_are(saved):
    engine = Engine.from_pretrained(saved, device="cpu", quantize="nf4")
    stored = load_file(saved / "model.safetensors")
    for name, tensor in engine.model.named_tensors():
        assert isinstance(tensor, QuantizedWeight) == is_linear(name) == name.endswith(LINEARS)
        if not is_linear(name):
            assert torch.equal(tensor, stored[name])


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_int8_is_within_half_a_step(scale):
    """The largest of a row is 127 steps; scales are bfloat16 numbers, up to 2^-7 larger than they need be."""
    torch.manual_seed(0)
    values = torch.randn(50, 300) * scale
    values[3] = 0
    codes, scales = encode(values, FORMATS["int8"])
    step = values.abs().amax(1, keepdim=True) / 127
    assert torch.equal(scales, scales.bfloat16().float())
    assert ((codes * scales - values).abs() <= 0.5 * 1.008 * step + 1e-37).all()
    assert (codes[3] == 0).all()
    assert codes.abs().max() <= 127


def test_nf4_is_the_nearest_of_sixteen():
    torch.manual_seed(0)
    values = torch.randn(20, 192)
    codes, scales = encode(values, FORMATS["nf4"])
    numbers = torch.stack([codes >> 4, codes & 15], 2).view(20, 192).long()
    shares = (values.view(20, 3, 64) / scales[:, :, None]).view(20, 192)
    assert torch.equal(scales, values.view(20, 3, 64).abs().amax(2))
    assert torch.equal(numbers, (shares[:, :, None] - torch.tensor(NF4)).abs().argmin(2))


def test_relative_errors_of_gaussian_weights():
    """0.8% and 9.2%, as the literature has it for a scale per channel of some thousand and for NF4."""
    torch.manual_seed(0)
    engine_weight = torch.randn(64, 4096)
    for name, bound in (("int8", 0.0095), ("nf4", 0.095)):
        weight = QuantizedWeight.empty(FORMATS[name], 64, 4096, torch.float32, torch.device("cpu"))
        codes, scales = encode(engine_weight, FORMATS[name])
        weight.codes.copy_(codes)
        weight.scales.copy_(scales)
        assert 0.8 * bound < relative_error(weight.dequantize(), engine_weight) < bound


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_has_bitsandbytes_bytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    values = torch.randn(96, 256).to(dtype)
    theirs, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    codes, scales = encode(values.float(), FORMATS["nf4"])
    assert torch.equal(scales.view(-1), state.absmax.float())
    assert torch.equal(codes.view(-1), theirs.view(-1))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_sampling(saved, quantize, dtype):
    """The losses of an adapter on an int8 base are within 2% of those on the base itself; all others run as well."""
    jobs = [
        TrainJob(oracle.sequences([30, 20], seed=i), LoraConfig(r=4), 3e-3, num_epochs=3, seed=None) for i in (0, 1)
    ]
    base, engine = (Engine.from_pretrained(saved, "cpu", dtype, quantize=q) for q in (None, quantize))
    before = {name: tensor.clone() for name, tensor in dequantized(engine).items()}
    expected, results = (e.train(jobs, progress=False) for e in (base, engine))
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.error is None
        assert ours.losses == pytest.approx(theirs.losses, rel=0.02 if quantize == "int8" else 0.1)
        assert ours.losses[4] < ours.losses[2] < ours.losses[0]  # of one sequence in three epochs
    after = dequantized(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    adapters = [results[0].adapter, None]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    prompts = oracle.sequences([5, 9])
    outs = engine.generate(prompts, params, adapters, progress=False)
    for prompt, out, adapter in zip(prompts, outs, adapters, strict=True):
        written = out.outputs[0].token_ids
        logits = engine.logits([[*prompt, *written]], adapter)[0][len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(written)[:, None]).squeeze(1)
        assert (logits.amax(1) - chosen).max() < (1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_an_adapters_bits_do_not_depend_on_the_others(saved, quantize):
    engine = Engine.from_pretrained(saved, "cpu", deterministic=True, quantize=quantize)
    jobs = [TrainJob(oracle.sequences([10 + 7 * i], seed=i), LoraConfig(r=2 + i), num_epochs=3) for i in range(3)]
    together = engine.train(jobs, progress=False)
    for job, result in zip(jobs, together, strict=True):
        alone = engine.train([job], progress=False)[0]
        assert alone.adapter is not None
        assert result.adapter is not None
        assert torch.equal(alone.adapter.params, result.adapter.params)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_memory_is_as_planned(saved, quantize):
    """The plan leaves norms out, which is less than 1% even here."""
    engine = Engine.from_pretrained(saved, "cpu", quantize=quantize)
    held = sum(tensor.nbytes for _, tensor in engine.model.named_tensors())
    planned = engine.plan(LoraConfig(r=4), 50, 2**32).weights_bytes
    assert planned == weights_bytes(engine.config, torch.bfloat16, FORMATS[quantize])
    assert planned == pytest.approx(held, rel=0.01)
    floats = weights_bytes(engine.config, torch.bfloat16, None)
    linears = floats - 2 * 2 * 1009 * 128  # bfloat16 embeddings and head stay
    share = {"int8": 0.5, "nf4": 0.28}[quantize]
    assert planned - (floats - linears) == pytest.approx(share * linears, rel=0.03)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_gguf_file_is_quantised_as_its_floats_are(quantize, tmp_path):
    """Rows of q and k are put in order first: codes equal those of the model before it was written."""
    model = oracle.make_model("llama", **SIZES)
    file = write_gguf(model, tmp_path / "model.gguf")
    engines = [
        Engine.from_pretrained(path, "cpu", quantize=quantize)
        for path in (file, oracle.save(model, tmp_path / "saved"))
    ]
    ours, theirs = (dequantized(engine) for engine in engines)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_quantised_base_is_not_merged_into_or_saved(saved, tmp_path):
    engine = Engine.from_pretrained(saved, "cpu", quantize="int8")
    adapter = engine.create_adapter(LoraConfig(r=2))
    with pytest.raises(InputError, match=r"merge: found a base quantised to int8; accepted: .*stays an adapter"):
        engine.merge(adapter)
    with pytest.raises(InputError, match="save_pretrained: found a base quantised to int8; accepted"):
        engine.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = dequantized(engine)
    engine.reload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dequantized(engine).items())
    with pytest.raises(InputError, match=r"quantize: found str 'int4'; accepted: None or one of \['int8', 'nf4'\]"):
        Engine.from_pretrained(saved, "cpu", quantize="int4")


def test_weights_that_are_not_finite_are_named(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor model.layers.1.mlp.up_proj.weight: found NaN or infinity"):
        Engine.from_pretrained(directory, "cpu", quantize="int8")


def test_a_run_that_would_merge_is_refused_before_it_begins(tmp_path, capsys):
    """One line that says what to use, and no run directory."""
    run = ["run", "miniature", "--out", str(tmp_path / "run"), f"--model={MODEL}", "--quantize=int8", "--quiet"]
    assert main([*run, "--policy-update=merge"]) == 2
    assert "policy_update" in (said := capsys.readouterr().err)
    assert "accepted: 'adapter': nothing is merged into a base quantised to int8" in said
    assert not (tmp_path / "run").exists()


def test_plan_quantize(saved, capsys):
    sizes = []
    for more in ([], ["--quantize", "int8"], ["--quantize", "nf4"]):
        options = ["--memory", "1GiB", "--sequence-tokens", "50", "--cpu", "--json", *more]
        assert main(["plan", "--model", str(saved), *options]) == 0
        sizes.append(json.loads(capsys.readouterr().out.splitlines()[-1])["weights_bytes"])
    assert sizes[0] > sizes[1] > sizes[2]
