"""Broken checkpoints and calls: each is refused with an InputError that names the file or field, or works."""

import json
import os
import pickle
import shutil
import struct
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

import oracle
from seal_engine import Engine, InputError
from seal_engine.model.checkpoint import INDEX
from seal_engine.model.config import ARCHITECTURES, ModelConfig

# Nothing here is large, so whatever takes longer than this hangs.
GENERATED = settings(
    max_examples=60,
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """2 GiB beyond what the process has mapped: an absurd allocation fails, also one that is never written to."""
    if sys.platform != "linux" or torch.cuda.is_available():  # CUDA maps far more than it uses
        yield
        return
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def trained_tokenizer(directory: Path) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["The quick brown fox jumps over the lazy dog."], trainer)
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}", "split_special_tokens": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Valid checkpoints by name, not to be changed."""
    directories = {}
    for name in ("llama", "llama-llama3", "llama-yarn", "qwen2", "qwen2-window"):
        directories[name] = oracle.save(oracle.make_model(name), tmp_path_factory.mktemp(name))
        trained_tokenizer(directories[name])
    model = oracle.make_model("qwen2")
    directories["sharded"] = oracle.save(model, tmp_path_factory.mktemp("sharded"), max_shard_size="1MB")
    return directories


@pytest.fixture
def llama(saved, tmp_path):
    """A valid checkpoint to break."""
    return Path(shutil.copytree(saved["llama"], tmp_path / "checkpoint"))


@pytest.fixture
def sharded(saved, tmp_path):
    return Path(shutil.copytree(saved["sharded"], tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def engine(saved):
    return Engine.from_pretrained(saved["llama"], device="cpu")


def load(directory, **arguments):
    return Engine.from_pretrained(directory, **{"device": "cpu", **arguments})


def refuses(directory, message: str, named: str = "") -> None:
    """Loading raises an InputError that matches `message` and names the file `named` in the directory."""
    with pytest.raises(InputError, match=message) as caught:
        load(directory)
    assert isinstance(caught.value, ValueError)
    assert str(Path(directory) / named) in str(caught.value)


def result_or_refusal(call, *arguments):
    """What the call returns, or the InputError that it raises; anything else that it raises is a failure."""
    try:
        return call(*arguments)
    except InputError as error:
        return error


def loads_or_is_refused(directory) -> Engine | None:
    result = result_or_refusal(load, directory)
    if isinstance(result, InputError):
        assert str(directory) in str(result)
        return None
    return result


def change_json(file: Path, **fields) -> None:
    """Write fields into a JSON object; `...` deletes one."""
    value = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: item for name, item in value.items() if item is not ...}))


def change_header(file: Path, change) -> None:
    """Pass a safetensors header through `change`, data unchanged."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


# The directory and its files


@pytest.mark.parametrize("path", ["absent", "name\0with a null", "x" * 300, "lone \udfff"])
def test_no_such_directory(tmp_path, path):
    refuses(tmp_path / path, "not a directory")


@pytest.mark.parametrize("path", [None, 3, b"bytes", ["list"]])
def test_not_a_path(engine, path):
    for call in (load, engine.save_pretrained):
        with pytest.raises(InputError, match=r"path: found .*; accepted: a str or a Path"):
            call(path)


def test_a_file_for_a_directory(llama):
    refuses(llama / "config.json", "not a directory")


def test_an_empty_directory(tmp_path):
    refuses(tmp_path, "missing", "config.json")


def test_weights_alone(llama):
    (llama / "config.json").unlink()
    refuses(llama, "missing", "config.json")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, "tokenizer.json", "tokenizer_config.json"])
def test_a_directory_in_place_of_a_file(llama, name):
    if name == INDEX:
        (llama / WEIGHTS).unlink()  # it goes before an index
    (llama / name).unlink(missing_ok=True)
    (llama / name).mkdir()
    refuses(llama, "cannot be read|not a readable safetensors file", name)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_link_to_itself(llama, name):
    (llama / name).unlink()
    (llama / name).symlink_to(llama / name)
    refuses(llama, "cannot be read|no weights")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_an_unreadable_file(llama, name):
    (llama / name).chmod(0)
    refuses(llama, "ermission denied", name)


class Unpickled:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", WEIGHTS, "tokenizer.json", "config.json"])
def test_nothing_is_unpickled(llama, tmp_path, name):
    made = tmp_path / "made"
    content = pickle.dumps(Unpickled(made))
    pickle.loads(content)
    made.rmdir()  # it works: so had it been unpickled below, it would be there
    if name == "pytorch_model.bin":
        (llama / WEIGHTS).unlink()
    (llama / name).write_bytes(content)
    refuses(llama, r"pytorch_model\.bin.*accepted: model\.safetensors" if name[0] == "p" else name)
    assert not made.exists()


def test_no_weights(llama):
    (llama / WEIGHTS).unlink()
    refuses(llama, "no weights.*accepted: model.safetensors")


# config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"hidden_size = 48", "not JSON"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b'\xef\xbb\xbf{"architectures": []}', "architectures: found list"),  # a byte order mark is passed over
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[]", "found list"),
        (b"null", "found NoneType"),
        (b'"LlamaForCausalLM"', "found str"),
        (b"{}", "architectures: found NoneType"),
    ],
)
def test_config_is_no_json_object(llama, content, message):
    (llama / "config.json").write_bytes(content)
    refuses(llama, message, "config.json")


NESTED = json.loads("[" * 900 + "]" * 900)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = oracle.LLAMA3
NOT_INTEGERS = [None, True, "48", 48.0, 1.5, 0, -1, 2**31, 10**300, float("nan"), float("inf"), [48], {}, NESTED]
NOT_NUMBERS = [None, True, "1", 0, -1.0, 1e39, 1e-60, 10**400, float("nan"), float("inf"), [1.0], {}]
INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


@pytest.mark.parametrize("name", INTEGERS)
def test_fields_that_are_positive_integers(saved, name):
    raw = json.loads((saved["llama"] / "config.json").read_text())
    for value in NOT_INTEGERS:
        if value is None and name in ("num_key_value_heads", "head_dim"):
            continue  # as if it were not written
        with pytest.raises(InputError, match=f"^config: {name}: found .*; accepted: a positive integer"):
            ModelConfig.from_dict({**raw, name: value})


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("rms_norm_eps", None),
        ("rope_theta", {"rope_type": "default"}),
        ("factor", {"rope_type": "linear"}),
        ("low_freq_factor", LLAMA3),
        ("high_freq_factor", LLAMA3),
        ("beta_fast", YARN),
        ("beta_slow", YARN),
        ("attention_factor", YARN),
        ("mscale", {**YARN, "mscale_all_dim": 1.0}),
    ],
)
def test_fields_that_are_positive_numbers(saved, name, rope):
    raw = json.loads((saved["llama"] / "config.json").read_text())
    for value in NOT_NUMBERS:
        if value is None and name in ("beta_fast", "beta_slow", "attention_factor", "mscale"):
            continue  # as if it were not written
        if not value and name == "mscale":
            continue  # as if it were not written, in Transformers too
        changed = {name: value} if rope is None else {"rope_parameters": {"rope_theta": 1e4, **rope, name: value}}
        with pytest.raises(InputError, match=f"{name}: found .*; accepted: a number from "):
            ModelConfig.from_dict({**raw, **changed})


def test_fields_that_are_booleans(saved):
    raw = json.loads((saved["llama"] / "config.json").read_text())
    for name in BOOLEANS:
        for value in (None, 0, 1, "true", []):
            with pytest.raises(InputError, match=f"{name}: found .*; accepted: true or false"):
                ModelConfig.from_dict({**raw, name: value})


def rope(**fields):
    return {"rope_parameters": fields}


CONFIGS = {
    "no architecture": (
        {"architectures": ..., "model_type": ...},
        "architectures: found NoneType.*" + ".*".join(sorted(ARCHITECTURES)),
    ),
    "another model type": ({"model_type": "mistral"}, "model_type: found str 'mistral'; accepted: llama"),
    "a file of other weights": ({"transformers_weights": "x.safetensors"}, "transformers_weights: found str"),
    "fields of single layers": ({"per_layer_config": {"0": {}}}, "per_layer_config: found dict"),
    "unknown architecture": ({"architectures": ["GPT2LMHeadModel"]}, r"architectures: .*GPT2.*LlamaForCausalLM"),
    "two architectures": ({"architectures": ["LlamaForCausalLM"] * 2}, "architectures: found list"),
    "architecture not in a list": ({"architectures": "LlamaForCausalLM"}, "architectures: found str"),
    "architecture no text": ({"architectures": [["LlamaForCausalLM"]]}, "architectures: found list"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config: found dict"),
    "heads no multiple of key/value heads": ({"num_key_value_heads": 4}, "num_attention_heads: 6 is not a multiple"),
    "hidden size no multiple of heads": ({"head_dim": None, "hidden_size": 50}, "hidden_size: found int 50"),
    "odd head_dim": ({"head_dim": 7}, "head_dim: found int 7; accepted: an even number"),
    "unknown activation": ({"hidden_act": "gelu"}, "hidden_act: found str 'gelu'; accepted: 'silu'"),
    "activation no text": ({"hidden_act": ["silu"]}, "hidden_act: found list"),
    "unknown dtype": ({"dtype": "float64"}, r"dtype: found str 'float64'; accepted: .*bfloat16"),
    "dtype no text": ({"dtype": 16}, "dtype: found int 16"),
    "old dtype": ({"dtype": None, "torch_dtype": "int8"}, "torch_dtype: found str 'int8'"),
    "rope no object": ({"rope_parameters": "yarn"}, "rope_parameters: found str 'yarn'; accepted: an object"),
    "old rope no object": ({"rope_parameters": None, "rope_scaling": [4]}, "rope_scaling: found list"),
    "unknown rope": (rope(rope_type="dynamic", factor=2.0), "rope_type: found str 'dynamic'.*default.*linear.*yarn"),
    "rope type no text": (rope(rope_type=["yarn"]), "rope_type: found list"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found float 0.5; accepted: 1.0"),
    "partial rotary inside": (rope(partial_rotary_factor=0.25), "rope_parameters: partial_rotary_factor: found"),
    "linear without factor": (rope(rope_type="linear"), "factor: found nothing"),
    "linear factor below 1": (rope(rope_type="linear", factor=0.5), "factor: found float 0.5; accepted: a number"),
    "yarn without factor": (rope(**{**YARN, "factor": None}), "factor: found NoneType"),
    "yarn factor below 1": (rope(**{**YARN, "factor": 0.99}), "factor: found float 0.99"),
    "yarn with theta 1": (rope(**{**YARN, "rope_theta": 1}), "rope_theta: found int 1; accepted: a number above 1"),
    "yarn with theta below 1": (rope(**{**YARN, "rope_theta": 0.5}), "rope_theta: found float 0.5"),
    "yarn betas in the wrong order": (rope(**YARN, beta_fast=1, beta_slow=32), "beta_fast: found int 1; .*beta_slow"),
    "yarn beta_slow above the default": (rope(**YARN, beta_slow=33), "beta_fast: found nothing; .*beta_slow, 33"),
    "yarn truncate": (rope(**YARN, truncate=1), "truncate: found int 1; accepted: true or false"),
    "yarn original length": (
        rope(**{**YARN, "original_max_position_embeddings": 10**12}),
        "original_max_position_embeddings: found int 10{12}; accepted: a positive integer below",
    ),
    "original length outside": (
        {"original_max_position_embeddings": "64", **rope(**YARN)},
        "original_max_position_embeddings: found str",
    ),
    "llama3 without low_freq_factor": (rope(**{**LLAMA3, "low_freq_factor": None}), "low_freq_factor: found None"),
    "llama3 low above high": (rope(**{**LLAMA3, "low_freq_factor": 5}), "high_freq_factor: found float 4.0"),
    "llama3 factor": (rope(**{**LLAMA3, "factor": "8"}), "factor: found str '8'"),
}
WINDOWS = {
    "sliding_window": ({"sliding_window": 0}, "sliding_window: found int 0"),
    "max_window_layers": ({"layer_types": None, "max_window_layers": -1}, "max_window_layers: found int -1"),
    "use_sliding_window": ({"use_sliding_window": "yes"}, "use_sliding_window: found str"),
    "layer_types too short": ({"layer_types": ["full_attention"]}, "layer_types: found list.*accepted: a list of 3"),
    "layer_types unknown": ({"layer_types": ["chunked_attention"] * 3}, "layer_types: found list.*full_attention"),
    "layer_types no list": ({"layer_types": "full_attention"}, "layer_types: found str"),
    "layer_types of lists": ({"layer_types": [["full_attention"]] * 3}, "layer_types: found list"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_fields(llama, kind):
    changes, message = CONFIGS[kind]
    change_json(llama / "config.json", **changes)
    refuses(llama, message, "config.json")


@pytest.mark.parametrize("kind", WINDOWS)
def test_window_fields(saved, kind):
    raw = json.loads((saved["qwen2-window"] / "config.json").read_text())
    changes, message = WINDOWS[kind]
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict({**raw, **changes})


def test_extremes_of_yarn_give_finite_frequencies():
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for theta in (1.0000001, most):
        for fast, slow in ((most, least), (most, most), (least, least)):
            for original in (1, 2**31 - 1):
                parameters = {
                    **YARN,
                    "rope_theta": theta,
                    "factor": most,
                    "beta_fast": fast,
                    "beta_slow": slow,
                    "original_max_position_embeddings": original,
                }
                config = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **rope(**parameters)})
                assert config.rope.inverse_frequencies(64).isfinite().all()


@pytest.mark.parametrize("value", [2**30, 2**31 - 2])
@pytest.mark.parametrize("name", [n for n in INTEGERS if n not in ("max_position_embeddings", "num_hidden_layers")])
def test_absurd_sizes_are_refused_by_their_shapes(llama, name, value):
    changes = {name: value}
    if name in ("num_attention_heads", "num_key_value_heads"):
        changes = {"num_attention_heads": value, "num_key_value_heads": value, "hidden_size": value}
    change_json(llama / "config.json", **changes)
    if name == "head_dim":
        value *= 6  # heads
    refuses(llama, rf"tensor \S+: found \[\d+, \d+\]; config.json asks for \[.*{value}", WEIGHTS)


def test_every_size_absurd(llama):
    change_json(llama / "config.json", **{n: 2**31 - 2 for n in INTEGERS if n != "num_hidden_layers"})
    refuses(llama, "config.json asks for", WEIGHTS)


@pytest.mark.parametrize("layers", [2, 4, 1000, 2**16 - 1])
def test_another_number_of_layers(llama, layers):
    change_json(llama / "config.json", num_hidden_layers=layers)
    refuses(llama, "num_hidden_layers|layers.3.* is missing|layers.2.* has no place")


def test_long_values_are_cut_short_in_messages(llama):
    change_json(llama / "config.json", hidden_size=list(range(100_000)))
    with pytest.raises(InputError, match=r"hidden_size: found list \[0, 1, 2") as caught:
        load(llama)
    assert len(str(caught.value)) < 500


# Weights


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 500, "header", -1, -4, -100_000])
def test_truncated_weights(llama, kept):
    content = (llama / WEIGHTS).read_bytes()
    if kept == "header":
        kept = 8 + struct.unpack("<Q", content[:8])[0]
    (llama / WEIGHTS).write_bytes(content[:kept])
    refuses(llama, "not a readable safetensors file", WEIGHTS)


@pytest.mark.parametrize("length", [0, 1, 100, "-8", "+8", 2**31, 2**63, 2**64 - 1])
def test_a_wrong_header_length(llama, length):
    content = (llama / WEIGHTS).read_bytes()
    if isinstance(length, str):
        length = struct.unpack("<Q", content[:8])[0] + int(length)
    (llama / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    refuses(llama, "not a readable safetensors file", WEIGHTS)


@pytest.mark.parametrize("header", [b"", b"[]", b"null", b"{", b"\xff\xff", b'{"a": 1}', b'{"a": {"dtype": "F32"}}'])
def test_a_header_that_is_none(llama, header):
    (llama / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    refuses(llama, "not a readable safetensors file", WEIGHTS)


def test_a_file_without_tensors(llama):
    save_file({}, llama / WEIGHTS)
    refuses(llama, "tensor model.embed_tokens.weight is missing")


@pytest.mark.parametrize("offsets", ["another's", [0, 2**62], [-4, 0], [8, 4], [0, 0], [0.0, 4.0], "ab", None])
def test_wrong_offsets(llama, offsets):
    def change(header):
        other = header["model.layers.1.self_attn.q_proj.weight"]["data_offsets"]
        header[Q_PROJ]["data_offsets"] = other if offsets == "another's" else offsets
        return header

    change_header(llama / WEIGHTS, change)
    refuses(llama, "not a readable safetensors file", WEIGHTS)


def replace_tensor(file: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(file) | {name: tensor}
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_of_weights(llama, dtype):
    replace_tensor(llama / WEIGHTS, Q_PROJ, torch.zeros(48, 48).to(dtype))
    refuses(llama, rf"tensor {Q_PROJ}: found dtype \w+; accepted: .*BF16", WEIGHTS)


@pytest.mark.parametrize("shape", [(48,), (), (0, 48), (47, 48), (48, 47), (48, 48, 1), (2304,)])
def test_shapes_of_weights(llama, shape):
    replace_tensor(llama / WEIGHTS, Q_PROJ, torch.zeros(shape))
    refuses(llama, rf"tensor {Q_PROJ}: found \[.*\]; config.json asks for \[48, 48\]", WEIGHTS)


def test_a_transposed_weight(llama):
    name = "model.layers.2.mlp.down_proj.weight"
    replace_tensor(llama / WEIGHTS, name, torch.zeros(100, 48))
    refuses(llama, rf"tensor {name}: found \[100, 48\]; config.json asks for \[48, 100\]", WEIGHTS)


@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor(llama, name):
    replace_tensor(llama / WEIGHTS, name, None)
    refuses(llama, f"tensor {name} is missing")


@pytest.mark.parametrize("name", ["extra", "model.layers.3.input_layernorm.weight", Q_PROJ.replace("weight", "bias")])
def test_an_extra_tensor(llama, name):
    replace_tensor(llama / WEIGHTS, name, torch.zeros(48))
    refuses(llama, f"tensor {name} has no place in a LlamaForCausalLM", WEIGHTS)


def test_another_architectures_weights(llama):
    change_json(llama / "config.json", architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    refuses(llama, "tensor model.layers.0.self_attn.q_proj.bias is missing")


def test_an_unaligned_header_loads(llama, engine):
    """Old writers did not pad the header."""
    change_header(llama / WEIGHTS, lambda header: {**header, "__metadata__": {"format": "pt", "a": "b"}})
    length = struct.unpack("<Q", (llama / WEIGHTS).read_bytes()[:8])[0]
    change_header(llama / WEIGHTS, lambda header: {**header, "__metadata__": {"pad": "x" * (length % 2)}})
    assert torch.equal(load(llama).logits([[1, 2]])[0], engine.logits([[1, 2]])[0])


def test_a_missing_shard(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    refuses(sharded, "missing", file.name)


def test_a_truncated_shard(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    refuses(sharded, "not a readable safetensors file", file.name)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", "..", None, 3, ["x.safetensors"]],
)
def test_index_with_wrong_file_names(sharded, shard):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded.parent / "x.safetensors").write_bytes(b"outside")
    change_json(sharded / INDEX, weight_map={**weight_map, Q_PROJ: shard})
    refuses(sharded, f"weight_map: {Q_PROJ}: found .*; accepted: a .safetensors file name", INDEX)


@pytest.mark.parametrize("shard", ["absent.safetensors", "null\0.safetensors", "\ud800.safetensors"])
def test_index_with_files_that_are_not_there(sharded, shard):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    change_json(sharded / INDEX, weight_map={**weight_map, Q_PROJ: shard})
    refuses(sharded, "missing|not a readable safetensors file", shard)


def test_index_that_names_the_wrong_shard(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[Q_PROJ])
    change_json(sharded / INDEX, weight_map={**weight_map, Q_PROJ: other})
    refuses(sharded, f"tensor {Q_PROJ} is in {INDEX} but not in this file", other)


def test_index_that_leaves_a_tensor_out(sharded):
    """It is read all the same, as Transformers reads all of each shard."""
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    del weight_map[Q_PROJ]
    change_json(sharded / INDEX, weight_map=weight_map)
    truth = oracle.logits(oracle.load(sharded, torch.float32), [[1, 2, 3]])[0]
    assert torch.allclose(load(sharded).logits([[1, 2, 3]])[0], truth, atol=1e-4)


@pytest.mark.parametrize("weight_map", [..., None, [], {}, "x.safetensors"])
def test_index_without_a_weight_map(sharded, weight_map):
    change_json(sharded / INDEX, weight_map=weight_map)
    refuses(sharded, "weight_map: found .*accepted: names to shard files", INDEX)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_index_that_is_no_json_object(sharded, content):
    (sharded / INDEX).write_bytes(content)
    refuses(sharded, "not JSON|found list|not UTF-8", INDEX)


# The tokenizer's files: tests/test_tokenizer.py has more


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0"'),
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"' + "9" * 5000 + '": "x"}}'),
        ("generation_config.json", '{"eos_token_id": 1.5}'),
        ("special_tokens_map.json", '{"eos_token": 3}'),
    ],
)
def test_broken_tokenizer_files(llama, name, content):
    (llama / name).write_text(content)
    refuses(llama, "found|not JSON", name)


def test_a_truncated_tokenizer(llama):
    file = llama / "tokenizer.json"
    for kept in (1, 100, 2000, file.stat().st_size - 2):
        file.write_bytes(file.read_bytes()[:kept])
        refuses(llama, "accepted: a tokenizer.json of the tokenizers library", "tokenizer.json")


def test_text_without_a_tokenizer(llama):
    (llama / "tokenizer.json").unlink()
    engine = load(llama)
    assert len(engine.score([[1, 2, 3]])[0]) == 2
    for call in (engine.logits, engine.score):
        with pytest.raises(InputError, match=r"sequences\[1\]: .*tokenizer.json: no such file"):
            call([[1, 2], "text"])
    with pytest.raises(InputError, match="without a tokenizer"):
        Engine(engine.model).score(["text"])


def test_a_tokenizer_with_more_tokens_than_the_model(llama):
    backend = Backend(models.WordLevel({"known": 5, "unknown": 2000}, unk_token="known"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(llama / "tokenizer.json"))
    (llama / "tokenizer_config.json").unlink()
    engine = load(llama)
    assert len(engine.logits(["known known"])[0]) == 2
    with pytest.raises(InputError, match=r"sequences\[1\]: token 1: found id int 2000; accepted: 0 to 1008"):
        engine.logits(["known", "known unknown"])


def test_a_template_that_python_cannot_compile(engine):
    template = "{% for a in messages %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(InputError, match="chat_template: SyntaxError"):
        engine.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template)


# Arguments


@pytest.mark.parametrize(
    "device", ["tpu", "", "CPU", "mps", "meta", "cuda:x", "cuda:-1", "cuda:999", 3.5, None, True, [], 2**70, -1]
)
def test_devices(saved, device):
    with pytest.raises(InputError, match=r"device: found .*; accepted: 'auto', 'cpu'"):
        load(saved["llama"], device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), 0])
def test_cuda_without_a_device(saved, device):
    with pytest.raises(InputError, match="device: found"):
        load(saved["llama"], device=device)


@pytest.mark.parametrize("dtype", ["int8", "float64", "", "torch.float32", torch.int8, torch.float64, None, 3.5, []])
def test_dtypes(saved, dtype):
    with pytest.raises(InputError, match=r"dtype: found .*; accepted: 'auto' or one of .*bfloat16"):
        load(saved["llama"], dtype=dtype)


SEQUENCES = {
    "one text": ("text", r"sequences: found str 'text'; accepted: a list"),
    "none": (None, "sequences: found NoneType"),
    "a number": (3, "sequences: found int 3"),
    "an iterator": (iter([[1]]), "sequences: found list_iterator"),
    "a tensor": (torch.tensor([[1, 2]]), "sequences: found Tensor"),
    "an array": (np.array([[1, 2]]), "sequences: found ndarray"),
    "a set": ({(1, 2)}, "sequences: found set"),
    "bytes": (b"text", r"sequences\[0\]: found int 116; accepted: text or a list of integers"),
    "one sequence": ([1, 2], r"sequences\[0\]: found int 1;"),
    "no token": ([[]], r"sequences\[0\]: found no token; accepted: at least one"),
    "no text": (["text", ""], r"sequences\[1\]: found no token"),
    "an empty tensor": ([torch.tensor([])], r"sequences\[0\]: found no token"),
    "surrogates": (["a", "\ud800"], r"sequences\[1\]: text: found a lone surrogate"),
    "floats": ([[1.0, 2.0]], r"sequences\[0\]: found list \[1.0, 2.0\]"),
    "a float tensor": ([torch.ones(2)], r"sequences\[0\]: found Tensor"),
    "a float array": ([np.ones(2)], r"sequences\[0\]: found ndarray"),
    "booleans": ([[True, False]], r"sequences\[0\]: found list \[True"),
    "a boolean tensor": ([torch.ones(2, dtype=torch.bool)], r"sequences\[0\]: found Tensor"),
    "a boolean array": ([np.ones(2, dtype=bool)], r"sequences\[0\]: found ndarray"),
    "none for a sequence": ([[1], None], r"sequences\[1\]: found NoneType"),
    "none for an id": ([[1, None]], r"sequences\[0\]: found list \[1, None\]"),
    "texts for ids": ([["1", "2"]], r"sequences\[0\]: found list \['1'"),
    "bytes for ids": ([b"text"], r"sequences\[0\]: found bytes"),
    "a set of ids": ([{1, 2}], r"sequences\[0\]: found set"),
    "a dict": ([{"input_ids": [1, 2]}], r"sequences\[0\]: found dict"),
    "an iterator of ids": ([iter([1])], r"sequences\[0\]: found list_iterator"),
    "nested ids": ([[[1, 2]]], r"sequences\[0\]: found list \[\[1, 2\]\]"),
    "a tensor of two dimensions": ([torch.ones(1, 2, dtype=torch.int64)], r"sequences\[0\]: found Tensor"),
    "a tensor of no dimension": ([torch.tensor(3)], r"sequences\[0\]: found Tensor"),
    "an array of two dimensions": ([np.ones((1, 2), dtype=int)], r"sequences\[0\]: found ndarray"),
    "a negative id": ([[1], [2, -1]], r"sequences\[1\]: token 1: found id int -1; accepted: 0 to 1008"),
    "an id too large": ([[1009]], r"sequences\[0\]: token 0: found id int 1009"),
    "an id far too large": ([[2**70]], r"sequences\[0\]: token 0: found id int \d+"),
    "an id too large to print": ([[10**5000]], r"sequences\[0\]: token 0: found id int too large to print"),
    "a tensor's id too large": ([torch.tensor([5, 1009])], r"sequences\[0\]: token 1: found id int 1009"),
    "too long": ([[1] * 513], r"sequences\[0\]: found 513 tokens; accepted: at most 512 .max_position_embeddings"),
    "too long a text": (["fox " * 600], r"sequences\[0\]: found \d+ tokens; accepted: at most 512"),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences(engine, kind):
    sequences, message = SEQUENCES[kind]
    for call in (engine.logits, engine.score):
        with pytest.raises(InputError, match=message):
            call(sequences)


def test_a_list_with_itself_in_it(engine):
    loop = []
    loop.append(loop)
    with pytest.raises(InputError, match=r"sequences\[0\]: found list"):
        engine.score(loop)


def test_what_counts_as_a_sequence(engine):
    ids = [5, 1008, 0]
    for convert in (tuple, np.array, torch.tensor, lambda ids: [np.int64(i) for i in ids], lambda ids: range(3)):
        sequence = convert(ids)
        truth = [0, 1, 2] if isinstance(sequence, range) else ids
        assert torch.equal(engine.score([sequence])[0], engine.score([truth])[0])
    assert len(engine.logits([[1] * 512])[0]) == 512


def test_no_sequences(engine):
    for call in (engine.logits, engine.score):
        assert call([]) == []
        assert call(()) == []


def files_below(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


@pytest.mark.parametrize("place", ["file", "file/below", "full", "x" * 256, "null\0", "lone\udfff", "loop", "to-full"])
def test_places_not_to_save_in(engine, tmp_path, place):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to-full").symlink_to(tmp_path / "full")
    before = files_below(tmp_path)
    with pytest.raises(InputError, match="accepted: a new or empty directory") as caught:
        engine.save_pretrained(tmp_path / place)
    assert str(tmp_path) in str(caught.value)
    assert files_below(tmp_path) == before
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(engine, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="ermission denied"):
        engine.save_pretrained(tmp_path / "new")
    assert files_below(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc, where no one may write, is Linux's")
def test_a_place_where_no_one_may_write(engine):
    with pytest.raises(InputError, match=r"/proc/new: .*accepted: a new or empty directory"):
        engine.save_pretrained("/proc/new")


@pytest.mark.parametrize("place", ["empty", "new", "new/parents/too", "x" * 255, "to-empty", "to-new"])
def test_places_to_save_in(engine, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to(tmp_path / "empty")
    (tmp_path / "to-new").symlink_to(tmp_path / "new")
    engine.save_pretrained(tmp_path / place)
    assert torch.equal(load(tmp_path / place).logits([[1, 2]])[0], engine.logits([[1, 2]])[0])
    assert not [p for p in files_below(tmp_path) if p.name.startswith(".")]


def test_every_file_beside_the_weights_is_saved(llama, tmp_path):
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (llama / "additional_chat_templates" / "notes.txt").write_text("not a template")
    (llama / "merges.txt").mkdir()  # not a file, so not copied
    change_json(llama / "config.json", note="naïve \ud800")  # a surrogate that UTF-8 cannot write
    load(llama).save_pretrained(tmp_path / "saved")
    names = [str(p.relative_to(tmp_path / "saved")) for p in files_below(tmp_path / "saved")]
    assert names == [
        "additional_chat_templates",
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load(tmp_path / "saved").config.raw["note"] == "naïve \ud800"
    assert load(tmp_path / "saved").tokenizer.chat_templates == load(llama).tokenizer.chat_templates


# Generated


ODD_VALUES = [
    *(None, True, False, "", "silu", "48", "\ud800", [], {}, [1], {"a": 1}, NESTED, float("nan"), float("inf")),
    *(-1, 0, 1, 2, 3, 4, 6, 8, 48, 100, 512, 1009, 2**15, 2**16, 2**30, 2**31 - 1, 2**31, 2**63, 2**64, 10**400),
    *("yarn", "linear", "llama3", "default", "bfloat16", "torch.float16", ["sliding_attention"] * 3),
    *(-1.0, 0.0, -0.0, 5e-324, 1e-38, 1e-6, 0.5, 1.0, 1.0000001, 4.0, 48.0, 1e30, 3e38, 1e39, 1e308),
]
VALUES = st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=5)
FURTHER_FIELDS = (
    *("rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor", "torch_dtype"),
    *("quantization_config", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("model_type", "per_layer_config", "transformers_weights"),
)
FIELDS_READ = (
    *("architectures", "rms_norm_eps", "hidden_act", "dtype", "rope_parameters"),
    *(*INTEGERS, *BOOLEANS, *FURTHER_FIELDS),
)
ROPE_FIELDS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "partial_rotary_factor",
)
LLAMA3_FIELDS = ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
ROPE_FIELDS_READ = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": LLAMA3_FIELDS,
    "yarn": (*LLAMA3_FIELDS[:3], "beta_fast", "beta_slow", "attention_factor", "truncate"),
}


@given(st.data())
@settings(GENERATED, max_examples=150)
def test_one_changed_field(saved, tmp_path, data):
    """Either the config says what was written, and loads and runs, or it is refused."""
    name = data.draw(st.sampled_from(["llama", "llama-llama3", "llama-yarn", "qwen2-window"]))
    raw = json.loads((saved[name] / "config.json").read_text())
    before = ModelConfig.from_dict(raw)
    inside = data.draw(st.booleans())
    fields = raw["rope_parameters"] if inside else raw
    field = data.draw(st.sampled_from(ROPE_FIELDS if inside else sorted({*raw, *FURTHER_FIELDS, *INTEGERS})))
    value = data.draw(VALUES | st.just(...))
    if value is ...:
        fields.pop(field, None)
    else:
        fields[field] = value
    for file in saved[name].iterdir():
        if not (tmp_path / name / file.name).exists():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / name / "config.json").unlink()
    (tmp_path / name / "config.json").write_text(json.dumps(raw))
    after = result_or_refusal(ModelConfig.from_dict, json.loads(json.dumps(raw)))
    if isinstance(after, InputError):
        assert str(after).startswith("config: ")
        assert loads_or_is_refused(tmp_path / name) is None
        return
    written = value is not ... and value is not None
    if written and inside and field in ROPE_FIELDS_READ[after.rope.rope_type]:
        assert getattr(after.rope, field) == value
    elif written and not inside and field == "max_position_embeddings":
        assert after.max_position_embeddings == after.rope.max_length(value)
    elif written and not inside and field in (*INTEGERS, *BOOLEANS, "rms_norm_eps"):
        assert getattr(after, field) == value
        assert isinstance(value, bool) == (field in BOOLEANS)
        assert isinstance(value, int) or field not in INTEGERS
    elif not inside and field not in FIELDS_READ:
        assert after == before
    engine = loads_or_is_refused(tmp_path / name)
    if engine is not None:
        assert engine.config == after
        (logits,) = engine.logits([[1, 2, 3][: after.max_position_embeddings]])
        assert logits.shape[1] == after.vocab_size
        if not field.startswith(("mscale", "attention_factor")):  # those scale attention as they say, without bound
            assert logits.isfinite().all()


DAMAGED = [
    ("llama", WEIGHTS),
    ("llama", "config.json"),
    ("llama", "tokenizer.json"),
    ("llama", "tokenizer_config.json"),
    ("sharded", INDEX),
]


@pytest.mark.parametrize(("name", "damaged"), DAMAGED)
@given(st.data())
@GENERATED
def test_damaged_files(saved, tmp_path, name, damaged, data):
    if not (tmp_path / name).exists():
        shutil.copytree(saved[name], tmp_path / name)
    content = bytearray((saved[name] / damaged).read_bytes())
    # Most of the weights is data; in its first 5000 bytes is the header.
    position = st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 5000) - 1)
    if data.draw(st.booleans()):
        del content[data.draw(position) :]
    else:
        for place, byte in data.draw(st.dictionaries(position, st.integers(0, 255), min_size=1, max_size=4)).items():
            content[place] = byte
    (tmp_path / name / damaged).write_bytes(content)
    engine = loads_or_is_refused(tmp_path / name)
    if engine is not None and damaged.startswith("tokenizer"):
        result = result_or_refusal(engine.score, ["The quick brown fox <|end|>"])
        assert str(result).startswith("sequences[0]: ") if isinstance(result, InputError) else len(result) == 1


@pytest.mark.parametrize("place", [0, 1000, 4095, 4096, -1])
def test_flipped_bits_of_data_load(llama, engine, place):
    content = bytearray((llama / WEIGHTS).read_bytes())
    data = 8 + struct.unpack("<Q", content[:8])[0]
    content[data + place if place >= 0 else place] ^= 1
    (llama / WEIGHTS).write_bytes(content)
    before, after = dict(engine.model.named_tensors()), dict(load(llama).model.named_tensors())
    assert sum(int((before[name] != after[name]).sum()) for name in before) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ODD_VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KNOWN_FIELDS = {
    "config.json": (*INTEGERS, *BOOLEANS, *FURTHER_FIELDS, "rope_parameters", "hidden_act", "dtype", "rms_norm_eps"),
    "tokenizer.json": ("version", "model", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "truncation"),
    "tokenizer_config.json": (
        *("eos_token", "pad_token", "chat_template", "added_tokens_decoder", "extra_special_tokens"),
        *("clean_up_tokenization_spaces", "split_special_tokens", "additional_special_tokens"),
    ),
    "special_tokens_map.json": ("eos_token", "pad_token", "additional_special_tokens"),
    "generation_config.json": ("eos_token_id",),
    "chat_template.json": ("chat_template",),
    INDEX: ("metadata", "weight_map"),
}


@pytest.mark.parametrize("name", KNOWN_FIELDS)
@given(st.data())
@settings(GENERATED, max_examples=40)
def test_any_json_in_a_file(saved, tmp_path, name, data):
    """Any JSON document, and objects of the file's own fields with any JSON in them."""
    if not (tmp_path / "checkpoint").exists():
        shutil.copytree(saved["llama"], tmp_path / "checkpoint")
    value = data.draw(JSON | st.dictionaries(st.sampled_from(KNOWN_FIELDS[name]), JSON, min_size=1))
    if name == "config.json" and isinstance(value, dict):
        value["architectures"] = [data.draw(st.sampled_from(sorted(ARCHITECTURES)))]
    (tmp_path / "checkpoint" / name).write_text(json.dumps(value))
    engine = loads_or_is_refused(tmp_path / "checkpoint")
    if engine is not None:
        assert len(engine.score(["The quick"])) == 1


@given(JSON | st.lists(st.lists(st.integers(-3, 1012) | st.integers(), max_size=4), max_size=3))
@GENERATED
def test_any_sequences(engine, sequences):
    results = result_or_refusal(engine.score, sequences)
    if isinstance(results, InputError):
        assert str(results).startswith("sequences")
        return
    lengths = [len(engine.tokenizer.encode(s) if isinstance(s, str) else s) for s in sequences]
    assert [len(scores) + 1 for scores in results] == lengths
