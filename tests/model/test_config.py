"""config.json as Transformers 4 and 5 write it, and rotary frequencies against Transformers' own."""

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import oracle
from seal_engine.model.config import ModelConfig


def as_transformers_4(raw: dict) -> dict:
    """The same configuration with rope_theta, rope_scaling and torch_dtype, as in nearly every published file."""
    raw = json.loads(json.dumps(raw))
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if "dtype" in raw:
        raw["torch_dtype"] = raw.pop("dtype")
    raw.pop("layer_types", None)
    return raw


@pytest.mark.parametrize("name", oracle.MODELS)
def test_both_ways_of_writing_are_one_config(name, tmp_path):
    theirs = oracle.make_model(name).config
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw
    raw["architectures"] = [type(oracle.make_model(name)).__name__]
    new, old = ModelConfig.from_dict(raw), ModelConfig.from_dict(as_transformers_4(raw))
    assert new == old
    assert new.rope.rope_type == theirs.rope_parameters["rope_type"]


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_the_oldest_name_of_the_rope_type(rope_type):
    """Files of 2023 say "type", not "rope_type"."""
    raw = {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": rope_type, "factor": 2.0}}
    assert ModelConfig.from_dict(raw).rope.rope_type == rope_type


@pytest.mark.parametrize("name", [n for n in oracle.MODELS if "rope_parameters" in oracle.MODELS[n][1]])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_inverse_frequencies_equal_transformers(name, head_dim):
    cls, changes = oracle.MODELS[name]
    theirs = cls(**{**oracle.BASE, **changes})
    theirs.head_dim = head_dim
    raw = {**theirs.to_dict(), "architectures": [cls.__name__.replace("Config", "ForCausalLM")]}
    rope = ModelConfig.from_dict(raw).rope
    if rope.rope_type == "default":
        truth, scale = rope.rope_theta ** -(torch.arange(0, head_dim, 2) / head_dim), 1.0
    else:
        truth, scale = ROPE_INIT_FUNCTIONS[rope.rope_type](theirs, torch.device("cpu"))
    torch.testing.assert_close(rope.inverse_frequencies(head_dim), truth, rtol=2e-7, atol=0)
    assert rope.attention_factor == pytest.approx(scale)


def test_published_configs_are_read_as_published():
    """Fields of three published config.json files (Transformers 4), and what follows from them."""
    llama = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        }
    )
    assert (llama.dtype, llama.windows[0], llama.qkv_bias, llama.tie_word_embeddings) == (
        torch.bfloat16,
        None,
        False,
        True,
    )
    assert llama.num_matrix_parameters == 1_235_746_816  # 1,235,814,400 parameters less 33 norms of 2,048
    qwen = ModelConfig.from_dict(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 152064,
        }
    )
    assert (qwen.head_dim, qwen.qkv_bias, qwen.o_bias, set(qwen.windows)) == (128, True, False, {None})
    mistral = ModelConfig.from_dict(
        {
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        }
    )
    assert mistral.windows == (4096,) * 32


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_fields_left_out_take_transformers_defaults(architecture):
    ours = ModelConfig.from_dict({"architectures": [architecture]})
    theirs = AutoConfig.for_model(architecture.removesuffix("ForCausalLM").lower())
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", 128)
    assert ours.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.windows[0] == (theirs.sliding_window if architecture == "MistralForCausalLM" else None)
