"""GGUF files against Transformers: SmolLM2 as it is published, and small files of every architecture."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
from compare import relative_error
from gguf_files import CHATML, smollm2, trained_backend, write_gguf
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.model.gguf import GGUFFile
from seal_engine.model.gguf_config import read_gguf_config
from seal_engine.model.gguf_tokenizer import SPLITS, read_gguf_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")  # Transformers makes tensors of read-only maps
TEXT = Path(os.__file__).with_name("statistics.py").read_text("utf-8")
CHAT = [
    {"role": "user", "content": " 12  34 naïve\n"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "<|im_end|>"},
]
SQUAD = Path(__file__).parents[3] / "shared/data/seal/squad_val_200.json"


def lines(count: int) -> list[str]:
    """Code, its whole paragraphs too, and odd text; passages of English where they are at hand."""
    code = [line for line in TEXT.split("\n") if line.strip()]
    texts = [*code[:count], *TEXT.split("\n\n")[: count // 10], "", "  ", "\r\n\t x", "Größe 東京 👋🏽 e\u0301 1²³ ½"]
    texts += [f"<|im_start|>user\n{line}<|im_end|>" for line in code[: count // 10]]
    if SQUAD.exists():
        texts += [record["context"] for record in json.loads(SQUAD.read_text("utf-8"))[: count // 10]]
    return texts


@pytest.fixture(scope="module")
def smol():
    file = smollm2()
    return file, Engine.from_pretrained(file, device="cpu")


@pytest.mark.xdist_group("smollm2")
def test_smollm2_equals_transformers_reading_of_the_file(smol):
    """Transformers reads the same blocks with the same library, so what differs is float32's rounding."""
    file, engine = smol
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    batch = [engine.tokenizer.encode(text) for text in ("The capital of France is", "def f(x):\n    return x + 12")]
    for ours, truth in zip(engine.logits(batch), oracle.logits(theirs, batch), strict=True):
        assert relative_error(ours, truth) < 1e-5


@pytest.mark.xdist_group("smollm2")
def test_smollm2_speaks(smol):
    """That Paris is France's capital is what a language model of English knows best."""
    _, engine = smol
    output = engine.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=3))[0]
    assert output.outputs[0].text.startswith(" Paris")


@pytest.mark.xdist_group("smollm2")
def test_smollm2s_token_ids_equal_transformers(smol):
    file, engine = smol
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in lines(300):
        ids = engine.tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        assert engine.tokenizer.decode(ids) == text
    for prompt in (True, False):
        ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
        assert engine.tokenizer.apply_chat_template(CHAT, add_generation_prompt=prompt) == ids
    assert engine.tokenizer.special_tokens_map == theirs.special_tokens_map
    assert engine.stop_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize(
    "name", ["llama", "llama-biases-tied", "llama-linear", "llama-llama3", "llama-yarn", "qwen2", "qwen2-yarn", "qwen3"]
)
def test_a_float32_file_has_the_models_logits(name, tmp_path):
    """The file holds the model's own float32 numbers, so Transformers' model before it was written is the truth."""
    theirs = oracle.make_model(name)
    engine = Engine.from_pretrained(write_gguf(theirs, tmp_path / "model.gguf"), device="cpu")
    assert engine.model.dtype == torch.float32
    batch = oracle.sequences([1, 40, 129])
    for ours, truth in zip(engine.logits(batch), oracle.logits(theirs, batch), strict=True):
        assert relative_error(ours, truth) < 1e-5


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        pytest.param((5e5, 8.0, 1.0, 4.0, 8192), id="Llama 3.1"),
        pytest.param((5e5, 32.0, 1.0, 4.0, 8192), id="Llama 3.2"),
        pytest.param((1e4, 4.0, 2.0, 3.0, 512), id="low is not 1"),
        pytest.param((1e6, 2.0, 1.0, 1.5, 300), id="narrow blend"),
    ],
)
def test_llama3s_scaling_is_recovered_from_its_factors(rope, head_dim, tmp_path):
    """The frequencies of the config that is read are those that the factors were computed from."""
    theta, factor, low, high, original = rope
    parameters = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_position_embeddings": original,
    }  # fmt: skip
    theirs = oracle.make_model(
        "llama", rope_parameters=parameters, head_dim=head_dim, num_hidden_layers=1, max_position_embeddings=8192
    )
    config = read_gguf_config(GGUFFile(write_gguf(theirs, tmp_path / "model.gguf")))
    truth = theirs.model.rotary_emb.inv_freq
    torch.testing.assert_close(config.rope.inverse_frequencies(head_dim), truth, rtol=1e-5, atol=0)
    if head_dim == 128 and low == 1.0 and high == 4.0:
        assert config.raw["rope_scaling"] == {k: v for k, v in parameters.items() if k != "rope_theta"}


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_equal_transformers_reading(quantisation, tmp_path):
    """All types that the library also writes; hidden and intermediate sizes are multiples of their block, 32."""
    theirs = oracle.make_model("llama", hidden_size=96, intermediate_size=128)
    file = write_gguf(theirs, tmp_path / "model.gguf", quantisation)
    engine = Engine.from_pretrained(file, device="cpu")
    expected = {"F16": torch.float16, "BF16": torch.bfloat16}.get(quantisation, torch.float32)
    assert engine.model.dtype == expected
    engine = Engine.from_pretrained(file, device="cpu", dtype="float32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    for name, tensor in engine.model.named_tensors():
        assert torch.equal(tensor, read[name]), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_blocks_that_the_library_only_reads(kind, tmp_path):
    """Any bytes are blocks; their numbers are the library's, piece by piece."""
    import gguf
    import numpy as np

    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    raw = np.random.default_rng(0).integers(0, 60, (5, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = GGUFFile(tmp_path / "model.gguf").tensors["x"]
    assert stored.shape == (5, 512)
    content = bytearray((tmp_path / "model.gguf").read_bytes()[stored.start : stored.stop])
    values = stored.values(torch.frombuffer(content, dtype=torch.uint8))
    assert torch.equal(values, torch.from_numpy(gguf.dequantize(raw, type_)))


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "smollm"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_token_ids_of_every_pre_tokenizer_equal_transformers(pre, add_bos, tmp_path):
    split = SPLITS[pre] or r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    backend = trained_backend(split, lines(400))
    size = backend.get_vocab_size()
    file = tmp_path / "model.gguf"
    write_gguf(oracle.make_model("llama", vocab_size=size, num_hidden_layers=1), file, "F32", backend, pre, add_bos)
    ours, theirs = read_gguf_tokenizer(GGUFFile(file)), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in lines(300):
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT)["input_ids"]


def test_control_tokens_that_the_byte_alphabet_cannot_spell_keep_their_ids(tmp_path):
    """As DeepSeek's: one token of the text, and text again."""
    fullwidth = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    backend = trained_backend(SPLITS["qwen2"] or "", ["a b c"], 300)
    size = backend.get_vocab_size()

    def rename(writer):
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[1] = fullwidth

    file = tmp_path / "model.gguf"
    write_gguf(oracle.make_model("qwen2", vocab_size=size), file, backend=backend, change=rename)
    tokenizer = read_gguf_tokenizer(GGUFFile(file))
    ids = tokenizer.encode(f"{fullwidth}a")
    assert ids == [1, *tokenizer.encode("a")]
    assert tokenizer.decode(ids) == f"{fullwidth}a"


def test_a_file_becomes_a_directory_that_transformers_loads(tmp_path):
    """Trained, merged and saved; the directory has the merged logits, the tokenizer and the chat template."""
    backend = trained_backend(SPLITS["qwen2"] or "", lines(100), 400)
    model = oracle.make_model("qwen2", vocab_size=backend.get_vocab_size())
    file = write_gguf(model, tmp_path / "model.gguf", "Q8_0", backend)
    engine = Engine.from_pretrained(str(file), device="cpu")
    job = TrainJob([TEXT[:200]], LoraConfig(r=2), learning_rate=1e-2, num_epochs=2, append_eos=True)
    result = engine.train([job], progress=False)[0]
    assert result.error is None
    assert result.adapter is not None
    result.adapter.save(tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(file)
    trained = engine.logits([TEXT[:50]], result.adapter)[0]
    before = engine.logits([TEXT[:50]])[0]
    engine.merge(result.adapter)
    engine.save_pretrained(tmp_path / "saved")
    theirs = oracle.load(tmp_path / "saved", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = tokenizer.encode(TEXT[:50])
    assert ids == engine.tokenizer.encode(TEXT[:50])
    assert tokenizer.chat_template == CHATML
    assert relative_error(oracle.logits(theirs, [ids])[0], trained) < 1e-5
    again = Engine.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.stop_token_ids == engine.stop_token_ids
    engine.reload()
    assert torch.equal(engine.logits([TEXT[:50]])[0], before)
