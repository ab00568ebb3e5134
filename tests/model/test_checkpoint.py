"""Reading and writing checkpoints: shards, dtypes, memory, and files that Transformers loads back unchanged."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import oracle
from seal_engine import Engine
from seal_engine.model import checkpoint
from seal_engine.model.checkpoint import load_model, save_model, stored_tensors

CPU = torch.device("cpu")


def all_tensors(directory):
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-biases-tied", "mistral-window", "qwen2", "qwen3"])
def test_what_is_written_equals_what_was_read(name, dtype, tmp_path):
    source = oracle.save(oracle.make_model(name).to(dtype), tmp_path / "theirs")
    (source / "tokenizer_config.json").write_text("{}")
    engine = Engine.from_pretrained(source, device="cpu")
    engine.save_pretrained(tmp_path / "ours")
    theirs, ours = all_tensors(source), all_tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) and theirs[k].dtype == ours[k].dtype for k in theirs)
    assert (tmp_path / "ours" / "tokenizer_config.json").read_text() == "{}"
    batch = oracle.sequences([20, 3])
    first = oracle.logits(oracle.load(source, dtype), batch)
    again = oracle.logits(oracle.load(tmp_path / "ours", dtype), batch)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_shards_are_read_and_written(tmp_path, monkeypatch):
    whole = oracle.save(oracle.make_model("qwen2"), tmp_path / "whole")
    sharded = oracle.save(oracle.make_model("qwen2"), tmp_path / "sharded", max_shard_size="1MB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    models = [load_model(directory, None, CPU) for directory in (whole, sharded)]
    for (name, a), (_, b) in zip(*(model.named_tensors() for model in models), strict=True):
        assert torch.equal(a, b), name
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1_000_000)
    save_model(models[0], tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert all(torch.equal(v, all_tensors(whole)[k]) for k, v in all_tensors(tmp_path / "ours").items())
    assert torch.equal(
        oracle.logits(oracle.load(tmp_path / "ours", torch.float32), [[1, 2, 3]])[0],
        oracle.logits(oracle.load(whole, torch.float32), [[1, 2, 3]])[0],
    )


def test_dtype_asked_for_is_converted_to(tmp_path):
    directory = oracle.save(oracle.make_model("llama"), tmp_path / "float32")
    engine = Engine.from_pretrained(directory, dtype="bfloat16", device="cpu")
    engine.save_pretrained(tmp_path / "bfloat16")
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    truth = all_tensors(directory)
    assert all(torch.equal(v, truth[k].bfloat16()) for k, v in all_tensors(tmp_path / "bfloat16").items())


def test_dtype_auto_without_a_word_in_the_config_is_the_tensors_own(tmp_path):
    directory = oracle.save(oracle.make_model("llama").to(torch.float16), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    del config["dtype"]
    (directory / "config.json").write_text(json.dumps(config))
    assert load_model(directory, None, CPU).dtype == torch.float16


def test_rotary_frequencies_and_a_tied_head_in_the_file_are_passed_over(tmp_path):
    directory = oracle.save(oracle.make_model("llama-biases-tied"), tmp_path)
    tensors = {name: t.clone() for name, t in load_file(directory / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    checkpoint.write_safetensors(directory / "model.safetensors", list(tensors.items()))
    model = load_model(directory, None, CPU)
    assert model.lm_head is model.embed


def test_the_header_we_write_is_read_by_the_library(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    }
    checkpoint.write_safetensors(tmp_path / "t.safetensors", list(tensors.items()))
    read = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(read[k], v) for k, v in tensors.items())


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    model = load_model(oracle.save(oracle.make_model("llama"), tmp_path / "theirs"), None, CPU)
    monkeypatch.setattr(checkpoint, "_write_shards", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        save_model(model, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def test_existing_files_are_not_overwritten(tmp_path):
    directory = oracle.save(oracle.make_model("llama"), tmp_path / "theirs")
    with pytest.raises(ValueError, match="new or empty directory"):
        Engine.from_pretrained(directory, device="cpu").save_pretrained(directory)


PEAK = """
import sys, torch
from seal_engine.model.checkpoint import load_model
kib = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
before = kib("VmRSS")
model = load_model(sys.argv[1], None, torch.device("cpu"))
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("max_shard_size", ["100MB", "5GB"])
def test_peak_memory_of_loading(tmp_path, max_shard_size):
    """At most 1.2 times the checkpoint, pages of the mapped file included."""
    oracle.MODELS["large"] = (
        oracle.MODELS["llama"][0],
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 20,
            "vocab_size": 4096,
            "num_attention_heads": 8,
        },
    )
    directory = oracle.save(oracle.make_model("large"), tmp_path, max_shard_size=max_shard_size)
    del oracle.MODELS["large"]
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert size > 200_000_000
    result = subprocess.run(
        [sys.executable, "-c", PEAK, directory], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert int(result.stdout) < 1.2 * size


def test_headers_alone_are_read_to_list_tensors(tmp_path):
    directory = oracle.save(oracle.make_model("llama"), tmp_path)
    stored = stored_tensors(directory)
    assert stored["model.norm.weight"].shape == (48,)
    assert stored["model.norm.weight"].stop - stored["model.norm.weight"].start == 48 * 4
