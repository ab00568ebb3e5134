"""Each field of PEFT's LoraConfig is read as PEFT reads it, has no say in the logits, or is refused by name."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

import oracle
from compare import relative_error
from seal_engine import Engine, InputError, LoraConfig
from seal_engine.model.peft_config import IGNORED, NEUTRAL, READ

BATCH = oracle.sequences([9, 24], seed=3)
TARGETS = ["q_proj", "v_proj"]
DEFAULTS = {**PeftConfig().to_dict(), "runtime_config": {"ephemeral_gpu_offload": False}, "peft_type": "LORA"}


@pytest.fixture(scope="module")
def base():
    return oracle.make_model("llama")


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory):
    return Engine.from_pretrained(oracle.save(base, tmp_path_factory.mktemp("llama")), device="cpu")


def peft_adapter(base, directory, **fields):
    """An adapter that PEFT made and saved, every trained tensor random."""
    torch.manual_seed(7)
    model = get_peft_model(copy.deepcopy(base), PeftConfig(**{"r": 4, "target_modules": TARGETS, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def change(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def equals_peft(engine, base, directory):
    """The logits are those of PEFT's own reload, which the adapter changes."""
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()
    theirs, ours = oracle.logits(reloaded, BATCH), engine.logits(BATCH, adapters=engine.load_adapter(directory))
    for mine, truth, without in zip(ours, theirs, engine.logits(BATCH), strict=True):
        assert relative_error(mine, truth) < 1e-5
        assert relative_error(without, truth) > 1e-3
    return True


# A value other than the default for fields that are no switch.
OTHER_VALUES = {
    "task_type": "FEATURE_EXTRACTION",
    "auto_mapping": {"parent_library": "transformers"},
    "peft_version": "0.5.0",
    "base_model_name_or_path": "somebody/model",
    "revision": "main",
    "inference_mode": True,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "fan_in_fan_out": True,
    "megatron_core": "another",
    "qalora_group_size": 32,
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArBr"},
    "ensure_weight_tying": True,
}
FIELDS = sorted({field.name for field in dataclasses.fields(PeftConfig)})


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in READ])
@pytest.mark.filterwarnings("ignore")
def test_fields_that_are_not_read(name, engine, base, tmp_path):
    """At PEFT's default each is accepted; at another value it is one that PEFT ignores, too, or it is refused."""
    directory = peft_adapter(base, tmp_path)
    change(directory, **{name: DEFAULTS[name]})
    assert equals_peft(engine, base, directory)
    change(directory, **{name: OTHER_VALUES.get(name, {"x": 1} if DEFAULTS[name] is None else True)})
    if name in IGNORED:
        assert equals_peft(engine, base, directory)
    else:
        with pytest.raises(InputError, match=rf"adapter_config\.json: {name}: found .*does not support it"):
            engine.load_adapter(directory)


def test_the_fields_that_are_read_have_tests():
    """Below and in test_adapters.py; a field that a new PEFT adds is none of these, so it is refused."""
    assert set(FIELDS) >= READ
    assert set(FIELDS) >= IGNORED
    tested = {"peft_type", "bias", "init_lora_weights", *SELECTING}
    assert tested | set(LoraConfig.__dataclass_fields__) == READ


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"x": 1}, *NEUTRAL])
def test_an_unknown_field_is_refused_unless_it_switches_nothing_on(value, engine, base, tmp_path):
    change(peft_adapter(base, tmp_path), use_what_comes_next=value)
    if value in NEUTRAL:
        engine.load_adapter(tmp_path)
        return
    with pytest.raises(InputError, match="use_what_comes_next: found"):
        engine.load_adapter(tmp_path)


@pytest.mark.parametrize("kind", [True, False, "gaussian", "orthogonal", "eva", "mica"])
@pytest.mark.filterwarnings("ignore")
def test_initialisations_that_leave_the_base_alone(kind, engine, base, tmp_path):
    assert equals_peft(engine, base, peft_adapter(base, tmp_path, init_lora_weights=kind))


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_change_the_base(kind, engine, base, tmp_path):
    """PEFT changes the base again when it loads the adapter: A and B on the base as it is give other logits."""
    directory = peft_adapter(base, tmp_path, init_lora_weights=kind)
    with pytest.raises(InputError, match=f"init_lora_weights: found '{kind}'; accepted: True"):
        engine.load_adapter(directory)
    change(directory, init_lora_weights=True)
    wrong = engine.logits(BATCH, adapters=engine.load_adapter(directory))
    change(directory, init_lora_weights=kind)
    theirs = oracle.logits(PeftModel.from_pretrained(copy.deepcopy(base), directory).eval(), BATCH)
    assert relative_error(wrong[0], theirs[0]) > 1e-3


@pytest.mark.parametrize("kind", ["corda", "loftq", "lora_ga", "OLoRA", "what comes next", 3, ["pissa"]])
def test_other_initialisations_are_refused(kind, engine, base, tmp_path):
    change(peft_adapter(base, tmp_path), init_lora_weights=kind)
    with pytest.raises(InputError, match="init_lora_weights: found"):
        engine.load_adapter(tmp_path)


SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SELECTIONS = {
    "one layer": {"layers_to_transform": 1},
    "two layers": {"layers_to_transform": [0, 2]},
    "no layer named": {"layers_to_transform": []},
    "layers by their list": {"layers_to_transform": [2], "layers_pattern": "layers"},
    "layers by one of two lists": {"layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    "a full name is in any layer": {
        "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [2],
    },
    "names excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]},
    "a pattern excluded": {"exclude_modules": r".*layers\.[01]\..*"},
    "an end that is no name": {"exclude_modules": ["proj"]},
    "excluded from a pattern": {"target_modules": r".*\.[qv]_proj", "exclude_modules": ["v_proj"]},
    "a target that this model lacks": {"target_modules": [*TARGETS, "W_pack"]},
    "a layer that this model lacks": {"target_modules": ["q_proj", "layers.7.self_attn.v_proj"]},
    "layers and exclusion": {"layers_to_transform": [0, 1], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "a rank of its own": {"layers_to_transform": [1], "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("label", SELECTIONS)
@pytest.mark.filterwarnings("ignore")
def test_modules_are_selected_as_peft_selects_them(label, engine, base, tmp_path):
    directory = peft_adapter(base, tmp_path / "theirs", **SELECTIONS[label])
    assert equals_peft(engine, base, directory)
    engine.load_adapter(directory).save(tmp_path / "ours")
    assert equals_peft(engine, base, tmp_path / "ours")


REFUSED = {
    "lm_head": ({"target_modules": [*TARGETS, "lm_head"]}, "target_modules: .*adapts lm_head; not supported"),
    "embeddings": ({"target_modules": ["model.embed_tokens"]}, "target_modules: .*adapts model.embed_tokens"),
    "a pattern with lm_head": ({"target_modules": ".*(q_proj|lm_head)"}, "target_modules: .*adapts lm_head"),
    "all excluded": ({"exclude_modules": TARGETS}, "target_modules: .*match no module"),
    "no layer": ({"layers_to_transform": [3]}, "target_modules: .*match no module"),
    "no list of layers": ({"layers_to_transform": [1], "layers_pattern": "h"}, "target_modules: .*match no module"),
    "layers of a pattern": (
        {"layers_to_transform": [1], "target_modules": ".*q_proj"}, "layers_to_transform: .*a list of targets",
    ),
    "a list without layers": ({"layers_pattern": "layers"}, "layers_pattern: .*only beside layers_to_transform"),
    "layers no numbers": ({"layers_to_transform": ["1"]}, "layers_to_transform: found list"),
    "layers a bool": ({"layers_to_transform": True}, "layers_to_transform: found bool"),
    "exclusion no names": ({"exclude_modules": [1]}, "exclude_modules: found list"),
    "exclusion no pattern": ({"exclude_modules": "(q"}, r"exclude_modules: found '\(q', no regular expression"),
    "list no pattern": (
        {"layers_to_transform": [1], "layers_pattern": ["("]}, r"layers_pattern: found '\(', no regular expression",
    ),
    "another bias": ({"bias": "lora_only"}, "bias: found 'lora_only'; accepted: 'none'"),
    "another method": ({"peft_type": "LOHA"}, "peft_type: found 'LOHA'"),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_what_is_refused(label, engine, base, tmp_path):
    fields, message = REFUSED[label]
    change(peft_adapter(base, tmp_path), **fields)
    with pytest.raises(InputError, match=rf"adapter_config\.json: {message}"):
        engine.load_adapter(tmp_path)
