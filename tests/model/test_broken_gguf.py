"""Broken GGUF files: each is refused with an InputError that names the file and the key or tensor."""

import struct
import subprocess
import sys

import pytest

import oracle
from gguf_files import trained_backend, write_gguf
from seal_engine import Engine, InputError
from seal_engine.model.gguf_tokenizer import SPLITS


@pytest.fixture(scope="module")
def tokenizer():
    return trained_backend(SPLITS["qwen2"] or "", ["the quick brown fox"], 300)


@pytest.fixture(scope="module")
def write(tokenizer):
    model = oracle.make_model("qwen2", vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1)
    return lambda file, **options: write_gguf(model, file, backend=tokenizer, **options)


def refuses(file, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Engine.from_pretrained(file, device="cpu")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def set_value(key, value):
    def change(writer):
        writer.kv_data[0][key].value = value

    return change


def a_number(key):
    def change(writer):
        del writer.kv_data[0][key]
        writer.add_uint32(key, 7)

    return change


def drop(key):
    def change(writer):
        del writer.kv_data[0][key]

    return change


CHANGES = {
    "unknown architecture": (
        lambda w: w.kv_data[0]["general.architecture"].__setattr__("value", "mamba"),
        r"general.architecture: found str 'mamba'; accepted: one of \['llama', 'mistral', 'qwen2', 'qwen3'\]",
    ),
    "no layers": (drop("qwen2.block_count"), "qwen2.block_count is missing from the metadata"),
    "heads that do not divide": (set_value("qwen2.attention.head_count", 4), "k_proj.weight: found"),
    "a text for a number": (lambda w: w.add_string("qwen2.rope.dimension_count", "8"), "dimension_count: found str"),
    "half of a head turned": (lambda w: w.add_rope_dimension_count(20), "rope.dimension_count: found 20; accepted: 40"),
    "values of another size": (lambda w: w.add_value_length(20), "attention.value_length: found 20; accepted: 40"),
    "a key that decides numbers": (lambda w: w.add_logit_scale(2.0), "qwen2.logit_scale: found float 2.0; accepted"),
    "experts": (lambda w: w.add_expert_count(8), "qwen2.expert_count: found int 8"),
    "a part of a file": (lambda w: w.add_uint16("split.count", 2), "split.count: found 2"),
    "unknown rope scaling": (lambda w: w.add_string("qwen2.rope.scaling.type", "su"), "scaling.type: found str 'su'"),
    "scaling without a factor": (
        lambda w: w.add_string("qwen2.rope.scaling.type", "linear"),
        "scaling.factor is missing",
    ),
    "unknown pre-tokenizer": (
        set_value("tokenizer.ggml.pre", "new"),
        "tokenizer.ggml.pre: found str 'new'; accepted: .*'llama-bpe', 'llama-v3', 'llama3', 'qwen2'",
    ),
    "no pre-tokenizer": (drop("tokenizer.ggml.pre"), "tokenizer.ggml.pre is missing"),
    "sentencepiece": (set_value("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model: found str 'llama'; accepted"),
    "no merges": (drop("tokenizer.ggml.merges"), "tokenizer.ggml.merges is missing"),
    "a merge of no token": (
        lambda w: w.kv_data[0]["tokenizer.ggml.merges"].value.append("zq zq"),
        r"tokenizer.ggml.merges\[\d+\]: found str 'zq zq'; accepted: two tokens",
    ),
    "types of fewer tokens": (
        lambda w: w.kv_data[0]["tokenizer.ggml.token_type"].value.pop(),
        "tokenizer.ggml.token_type: found list .*; accepted: 274 numbers from 1 to 6",
    ),
    "a token twice": (
        lambda w: w.kv_data[0]["tokenizer.ggml.tokens"].value.__setitem__(-1, "a"),
        "tokens: found str 'a' twice",
    ),
    "an end beyond the vocabulary": (set_value("tokenizer.ggml.eos_token_id", 9999), "eos_token_id: found 9999"),
    "a broken chat template": (
        a_number("tokenizer.chat_template"),
        "tokenizer.chat_template: found int 7; accepted: text",
    ),
    "fewer tokens than rows": (set_value("qwen2.vocab_size", 200), "embed_tokens.weight: found .*the metadata asks"),
    "alignment that is none": (lambda w: w.add_uint32("general.alignment", 7), "general.alignment: found int 7"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_metadata(case, write, tmp_path):
    change, message = CHANGES[case]
    refuses(write(tmp_path / "model.gguf", change=change), message)


def test_a_missing_and_an_unknown_tensor(write, tmp_path):
    import numpy as np

    refuses(
        write(tmp_path / "model.gguf", skip=("blk.0.ffn_up.weight",)),
        "layers.0.mlp.up_proj.weight is missing; the meta",
    )
    add = lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros(4, np.float32))  # noqa: E731
    refuses(write(tmp_path / "model.gguf", change=add), "tensor blk.0.ffn_gate_inp.weight has no place")


def damage(file, at: int, content: bytes):
    raw = bytearray(file.read_bytes())
    raw[at : at + len(content)] = content
    file.write_bytes(raw)
    return file


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        pytest.param(0, b"GGML", "does not begin with GGUF", id="another magic"),
        pytest.param(4, struct.pack("<I", 1), "found GGUF version 1; accepted", id="an old version"),
        pytest.param(4, struct.pack(">I", 3), "version 50331648; accepted.*little-endian", id="big-endian"),
        pytest.param(8, struct.pack("<Q", 2**60), "truncated|type|not UTF-8|dimensions|twice", id="too many tensors"),
        pytest.param(24, struct.pack("<Q", 2**60), "key 0: the file ends before it", id="a name that never ends"),
        pytest.param(32, b"\xff\xfe", "key 0: not UTF-8", id="a name that is no text"),
    ],
)
def test_header(at, content, message, write, tmp_path):
    refuses(damage(write(tmp_path / "model.gguf"), at, content), message)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.999])
def test_truncated(share, write, tmp_path):
    """Wherever a file ends too early, it is said which part is missing."""
    file = write(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refuses(file, "truncated|cannot be read")


def test_an_unknown_type_of_tensor(write, tmp_path):
    """The type of a tensor follows its name and sizes."""
    file = write(tmp_path / "model.gguf")
    name = b"blk.0.attn_q.weight"
    raw = file.read_bytes()
    at = raw.index(name) + len(name) + 4 + 2 * 8
    refuses(damage(file, at, struct.pack("<I", 16)), "tensor blk.0.attn_q.weight: found type IQ2_XXS; accepted: one of")
    refuses(damage(file, at, struct.pack("<I", 999)), "found type number 999")
    refuses(damage(file, at, struct.pack("<I", 12)), "found rows of 280; accepted: a multiple of 256")


def test_no_file(tmp_path):
    refuses(tmp_path / "absent.gguf", "cannot be read: No such file")


def test_without_the_library_the_extra_is_named(write, tmp_path):
    """One line that says what to install; importing the engine never needs the library."""
    file = write(tmp_path / "model.gguf")
    code = (
        "import sys; sys.modules['gguf'] = None\nfrom seal_engine import Engine, InputError\n"
        f"try: Engine.from_pretrained({str(file)!r})\nexcept InputError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"{file}: the gguf library is not installed; accepted: pip install 'seal-engine[gguf]'\n"
