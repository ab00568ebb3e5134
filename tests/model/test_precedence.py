"""Which of several stored things counts: our logits are those of Transformers' own reload, or the file is refused."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import oracle
from compare import relative_error
from seal_engine import Engine, InputError, LoraConfig
from seal_engine.model.checkpoint import INDEX
from seal_engine.model.config import ARCHITECTURES, ModelConfig
from seal_engine.model.rope import ROPE_KEYS

WEIGHTS = "model.safetensors"
BATCH = oracle.sequences([60, 7])


@pytest.fixture
def changed(checkpoint, tmp_path):
    """(name, fields) -> a copy of that checkpoint whose config.json has these fields; `...` deletes one."""

    def make(name, **fields):
        directory = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoint(name), directory)
        config = json.loads((directory / "config.json").read_text()) | fields
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return directory

    return make


def theirs(directory):
    return oracle.logits(oracle.load(directory, torch.float32), BATCH)


def refusal(call, *arguments) -> str | None:
    """The message with which the call is refused, or None where it returns something true."""
    try:
        assert call(*arguments), arguments
    except InputError as error:
        return str(error)


def equal(directory) -> bool:
    """Whether our logits are Transformers'. Raises InputError where we refuse."""
    ours = Engine.from_pretrained(directory, device="cpu").logits(BATCH)
    return all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs(directory), strict=True))


# config.json

SLIDING, FULL = ["sliding_attention"] * 3, ["full_attention"] * 3
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CHANGES = [
    *({"rms_norm_eps": 0.5}, {"hidden_act": "gelu"}, {"hidden_act": "swish"}, {"head_dim": 4}, {"head_dim": None}),
    *({"num_attention_heads": 3}, {"num_key_value_heads": None}, {"num_key_value_heads": 1}, {"num_hidden_layers": 2}),
    *({"attention_bias": True}, {"attention_bias": False}, {"mlp_bias": True}, {"tie_word_embeddings": True}),
    *({"tie_word_embeddings": False}, {"rope_theta": 50.0}, {"rope_parameters": None, "rope_theta": 50.0}),
    *({"rope_scaling": {"type": "linear", "factor": 3.0}}, {"rope_scaling": YARN}, {"rope_scaling": {}}),
    *({"rope_scaling": YARN, "original_max_position_embeddings": 32}, {"max_position_embeddings": 64}),
    *({"partial_rotary_factor": 0.5}, {"rope_parameters": {"full_attention": {"rope_theta": 50.0}}}),
    *({"sliding_window": 5}, {"sliding_window": None}, {"use_sliding_window": False}, {"max_window_layers": 0}),
    *({"layer_types": SLIDING}, {"layer_types": FULL}, {"layer_types": MIXED}, {"layer_types": None}),
    *({"sliding_window": 4, "layer_types": MIXED}, {"sliding_window": None, "layer_types": MIXED}),
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": MIXED},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2, "layer_types": None},
    *({"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, {"transformers_weights": "other.safetensors"}),
    *({"quantization_config": {"bits": 4}}, {"attention_dropout": 0.5}, {"pretraining_tp": 2}),
    *({"architectures": ["LlamaForCausalLM"]}, {"model_type": "llama"}, {"model_type": "mistral"}),
    *({"model_type": "qwen2"}, {"architectures": None}, {"architectures": ...}, {"architectures": []}),
]
MODELS = ["llama", "mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3", "qwen3-biases-window"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_every_field_that_decides_numbers_counts_as_in_transformers(name, changed):
    """Whatever a field says, our logits are Transformers' or the config is refused: nothing is passed over."""
    assert equal(changed(name))
    loaded = 0
    for change in CHANGES:
        directory = changed(name, **change)
        try:
            theirs(directory)
        except Exception:  # Transformers cannot load it: nobody knows what is right
            continue
        message = refusal(equal, directory)
        assert message is None or str(directory) in message
        loaded += message is None
    assert loaded >= 15, "the table is of changes that load, too"


def test_mistral_with_layer_types_is_ministral(changed):
    """Transformers loads it as such: a window on the layers that say so."""
    directory = changed("mistral-window", layer_types=MIXED)
    assert type(oracle.load(directory, torch.float32)).__name__ == "MinistralForCausalLM"
    assert Engine.from_pretrained(directory).config.windows == (7, None, 7)
    assert equal(directory)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("rest", [{"model_type": ...}, {"model_type": "gpt2"}, {"model_type": ["llama"]}])
def test_without_architectures_the_model_type_is_needed(name, rest, changed):
    with pytest.raises(InputError, match=r"config\.json: architectures: .*or none beside a model_type of \['llama'"):
        Engine.from_pretrained(changed(name, architectures=None, **rest))


def test_a_model_type_that_contradicts_is_refused(changed):
    """Transformers goes by the type and would compute a Mistral with a window of 4096."""
    with pytest.raises(InputError, match="model_type: found str 'mistral'; accepted: llama, as architectures says"):
        Engine.from_pretrained(changed("llama", model_type="mistral"))


# Rotary embeddings

ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
ROPE_VALUES = {
    "rope_theta": [77.0, 500000],
    "partial_rotary_factor": [0.5, 1.0],
    "factor": [2, 1.0, None],
    "original_max_position_embeddings": [32],
    "low_freq_factor": [2.0],
    "high_freq_factor": [8.0],
    "attention_factor": [1.7, 1, None],
    "beta_fast": [16, None],
    "beta_slow": [2.0, None],
    "mscale": [0.7, 0, None],
    "mscale_all_dim": [0.9, 0, None],
    "truncate": [False, True, None],
    "finetuned": [True],
    "type": ["linear"],
    # None of these is read by Transformers for the four types.
    **{name: [1.5, [1.0], None] for name in ("attn_factor", "short_factor", "long_factor", "mrope_section", "alpha")},
    **{name: [True, "x"] for name in ("rope_interleaved", "mscale_all_dims", "yarn_only_types", "beta")},
}


def frequencies(raw):
    """Transformers' inverse frequencies and scale for a config.json."""
    config = AutoConfig.for_model(**raw)
    config.head_dim = config.hidden_size // config.num_attention_heads
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq, rotary.attention_scaling


def same_frequencies(raw) -> bool:
    rope = ModelConfig.from_dict(raw).rope
    truth, scale = frequencies(json.loads(json.dumps(raw)))
    return torch.allclose(rope.inverse_frequencies(64), truth, rtol=3e-7) and rope.attention_factor == pytest.approx(
        scale
    )


RAW = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_all_rope_types_by_all_keys(rope_type):
    """As Transformers computes them, or refused. A key that it does not know is always refused: vLLM, or the author,
    means something by it (attn_factor scales attention)."""
    assert set(ROPE_VALUES) >= ROPE_KEYS - {"rope_type"}
    for name, values in ROPE_VALUES.items():
        for value in values:
            raw = {
                **RAW,
                "rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type], name: value},
            }
            message = refusal(same_frequencies, raw)
            if message is None:
                assert name in ROPE_KEYS or value is None
            else:
                assert f"rope_parameters: {name}: found" in message
                assert name not in ROPE_KEYS or value is None or (name, value) == ("partial_rotary_factor", 0.5)


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_which_of_two_ropes_counts(rope_type, model_type):
    """rope_scaling before rope_parameters, as a whole; rope_theta inside before outside; the length outside first."""
    inside = {"rope_type": rope_type, **ROPES[rope_type]}
    parameters = [
        ...,
        None,
        {"rope_type": "default", "rope_theta": 70.0},
        {**inside, "rope_theta": 70.0, "factor": 2.0},
    ]
    scalings = [..., None, {}, inside, {**inside, "rope_theta": 90.0}, {**ROPES[rope_type], "type": rope_type}]
    for written in itertools.product(parameters, scalings, [..., 50.0], [..., 128]):
        fields = zip(
            ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"), written, strict=True
        )
        raw = {**RAW, "model_type": model_type, "head_dim": 64, **{k: v for k, v in fields if v is not ...}}
        assert same_frequencies(raw), written


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 3.0}, 1536),
        ({"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 3e38, "original_max_position_embeddings": 128}, 2**31 - 1),
        (
            {"rope_type": "llama3", **ROPES["llama3"], "factor": 32.0},
            512,
        ),  # Llama 3.2: not 32 times its original length
    ],
    ids=["default", "linear", "yarn", "yarn of the whole length", "yarn, raised already", "yarn, absurd", "llama3"],
)
def test_the_longest_sequence_is_what_the_scaling_reaches(rope, longest):
    """Transformers has no limit; model cards add YaRN without raising max_position_embeddings."""
    assert ModelConfig.from_dict({**RAW, "rope_scaling": rope}).max_position_embeddings == longest


def test_yarn_runs_beyond_positions_that_were_not_raised(changed):
    directory = changed(
        "qwen2", max_position_embeddings=32, rope_scaling={**YARN, "original_max_position_embeddings": 32}
    )
    assert equal(directory)  # sequences of 60 tokens
    with pytest.raises(InputError, match="found 129 tokens; accepted: at most 128"):
        Engine.from_pretrained(directory).score([[1] * 129])


# Weights


def rewrite(directory, change):
    """Pass each safetensors file's tensors through `change`."""
    for file in directory.glob("*.safetensors"):
        save_file(change({name: tensor.clone() for name, tensor in load_file(file).items()}), file, {"format": "pt"})
    return directory


def test_a_single_file_goes_before_an_index(changed, tmp_path):
    """Left over from a save in another layout: Transformers looks for the single file first."""
    directory = changed("llama")
    older = oracle.save(oracle.make_model("llama", initializer_range=0.05), tmp_path / "older", max_shard_size="100KB")
    for file in older.glob("model*"):
        shutil.copy(file, directory)
    assert (directory / INDEX).exists()
    assert equal(directory)
    (directory / WEIGHTS).unlink()
    assert equal(directory)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    """The index names one, Transformers takes the last."""
    directory = oracle.save(oracle.make_model("llama"), tmp_path, max_shard_size="100KB")
    first, *_, last = sorted(directory.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor + 1}, last, {"format": "pt"})
    with pytest.raises(InputError, match=f"{last.name}: tensor {name} is in {first.name}, too"):
        Engine.from_pretrained(directory)


TIED = "llama-biases-tied"
HEADS = {
    "as embeddings": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
    "of its own": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 1.5},
    "one element apart": lambda t: (
        t | {"lm_head.weight": t["model.embed_tokens.weight"].index_fill(1, torch.tensor(3), 1)}
    ),
    "the only table": lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_the_config_ties(kind, changed, tmp_path):
    """Stored with values of its own, it is not tied; what is saved then says so."""
    directory = rewrite(changed(TIED), HEADS[kind])
    assert equal(directory)
    engine = Engine.from_pretrained(directory)
    assert engine.config.tie_word_embeddings == (kind in ("as embeddings", "the only table"))
    adapter = engine.create_adapter(LoraConfig(target_modules="all-linear"))
    before = engine.logits(BATCH)
    adapter.params.normal_(0, 0.1)
    engine.merge(adapter)
    engine.reload()
    assert all(torch.equal(a, b) for a, b in zip(engine.logits(BATCH), before, strict=True))
    engine.save_pretrained(tmp_path / "again")
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(theirs(tmp_path / "again"), before, strict=True))


def test_neither_table_is_refused(changed):
    directory = rewrite(changed(TIED), lambda t: {n: v for n, v in t.items() if "embed" not in n})
    with pytest.raises(InputError, match=r"tensor model\.embed_tokens\.weight is missing"):
        Engine.from_pretrained(directory)


@pytest.mark.parametrize("name", [TIED, "qwen2-window", "qwen3"])
def test_names_without_the_prefix(name, changed):
    """As saved from the model below the head; untied, the head keeps its name."""
    directory = rewrite(changed(name), lambda t: {n.removeprefix("model."): v for n, v in t.items()})
    assert equal(directory)


def test_a_tensor_with_and_without_the_prefix_is_refused(changed):
    directory = rewrite(changed(TIED), lambda t: t | {"norm.weight": t["model.norm.weight"] + 1})
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight is there twice"):
        Engine.from_pretrained(directory)


def test_a_base_model_without_a_head(changed):
    """Transformers would draw a random head."""
    fields = {"architectures": ["LlamaModel"]}
    assert equal(changed(TIED, **fields))
    directory = rewrite(changed("llama", **fields), lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    with pytest.raises(InputError, match=r"tensor lm_head\.weight is missing"):
        Engine.from_pretrained(directory)


def test_an_adapter_beside_the_weights_is_refused(changed, tmp_path):
    """Transformers loads the base that it names, and applies it."""
    directory = changed("llama")
    engine = Engine.from_pretrained(directory)
    adapter = engine.create_adapter(LoraConfig(r=4))
    adapter.params.normal_(0, 0.1)
    adapter.save(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, directory)
    with_adapter = engine.logits(BATCH, adapters=adapter)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(theirs(directory), with_adapter, strict=True))
    with pytest.raises(InputError, match=r"adapter_config\.json: an adapter beside a model's weights"):
        Engine.from_pretrained(directory)


def test_every_architecture_is_in_the_table():
    raw = {name: json.loads(json.dumps(oracle.make_model(name).config.to_dict())) for name in MODELS}
    assert {ModelConfig.from_dict(config).architecture for config in raw.values()} == set(ARCHITECTURES)
