"""Model shapes that benchmarks run with random parameters: fields of a Hugging Face config.json."""

import torch

from seal_engine.config import ModelConfig
from seal_engine.model import Model

SHAPES = {
    "2m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "97m": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 6,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Model:
    """The shape's model with normal(0, 0.02) matrices, norms of one and small biases."""
    config = ModelConfig.from_dict(SHAPES[shape], shape)
    model = Model(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, view in model.named_tensors():
        if name.endswith("norm.weight"):
            view.fill_(1.0)
        else:
            view.normal_(0.0, 0.02, generator=generator)
    return model
