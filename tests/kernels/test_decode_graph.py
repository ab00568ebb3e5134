"""Decode steps through padded tensors that stay, against the model itself: in the interpreter, or captured."""

import pytest
import torch

from compare import DEVICE, relative_error
from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.sampling.decode_graph import DecodeGraphs
from seal_engine.sampling.kv_cache import KVCache
from seal_engine.types import LoraConfig, PagedArrays
from seal_kernels.dispatch import INTERPRET

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
)


def make_model():
    torch.manual_seed(0)
    model = Model(CONFIG, torch.float32, DEVICE)
    for name, tensor in model.named_tensors():
        tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=0.2)
    return model


def adapter(r, seed):
    made = Adapter.create(CONFIG, LoraConfig(r=r, target_modules=("q_proj", "down_proj")), DEVICE, seed)
    made.params.normal_(std=0.2, generator=torch.Generator(DEVICE).manual_seed(seed))
    return made


def step(contexts, blocks, seed):
    """One new token of each sequence, behind contexts[i] - 1 that are in the cache."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.zeros(len(contexts), max(map(len, blocks)), dtype=torch.int32)
    for i, own in enumerate(blocks):
        tables[i, : len(own)] = torch.tensor(own)
    positions = torch.tensor(contexts) - 1
    slot_mapping = tables[torch.arange(len(contexts)), positions // 16].long() * 16 + positions % 16
    tensors = (
        torch.randint(53, (len(contexts),), generator=generator), positions,
        torch.arange(len(contexts) + 1, dtype=torch.int32), torch.tensor(contexts, dtype=torch.int32), tables,
        slot_mapping,
    )  # fmt: skip
    return PagedArrays(*(tensor.numpy() for tensor in tensors))


@pytest.mark.skipif(not INTERPRET and DEVICE.type != "cuda", reason="graphs are of the Triton path")
@torch.no_grad()
def test_a_graph_equals_the_model():
    """Steps of other rows, contexts and adapters through the same tensors: nothing of an earlier step is left."""
    model = make_model()
    graphs = DecodeGraphs(model)
    caches = [KVCache(CONFIG, 12, torch.float32, DEVICE) for _ in range(2)]
    noise = torch.randn(caches[0].keys.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for cache in caches:
        cache.keys.copy_(noise)
        cache.values.copy_(noise.flip(0))
    a, b, c = adapter(3, 1), adapter(2, 2), adapter(3, 3)
    steps = [
        ([5, 17, 40], [[3], [1, 2], [4, 5, 6]], [(None, 1), (a, 1), (b, 1)]),
        ([6, 18, 41, 1], [[3], [1, 2], [4, 5, 6], [7]], [(a, 3), (c, 1)]),
        ([30, 2], [[8, 9], [10]], [(b, 1), (a, 1)]),
        ([31, 3, 9], [[8, 9], [10], [11]], None),
        ([32], [[8, 9]], [(c, 1)]),
    ]
    for seed, (contexts, blocks, owners) in enumerate(steps):
        arrays = step(contexts, blocks, seed)
        owners, tokens = ([], []) if owners is None else map(list, zip(*owners, strict=True))
        lora = LoraBatch.make(owners, tokens)
        out = graphs.hidden_states(arrays, caches[0].keys, caches[0].values, lora, tokens)
        assert out.shape == (len(contexts), 32)
        expected = model.hidden_states(arrays.batch(caches[1].keys, caches[1].values), lora)
        assert relative_error(out, expected) < 1e-5
        assert relative_error(caches[0].keys, caches[1].keys) < 1e-5, "a padded row writes nothing"
        assert relative_error(caches[0].values, caches[1].values) < 1e-5
    assert len(graphs._graphs) < len(steps), "some steps shared a graph"
