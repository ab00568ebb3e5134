"""Training passes through padded tensors that stay, against the same passes alone: in the interpreter, or captured."""

import gc
import weakref

import pytest
import torch

from compare import DEVICE, relative_error
from seal_engine.model.transformer import Model
from seal_engine.training.losses import job_losses
from seal_engine.training.pass_graph import PassGraphs, padded_tokens
from seal_engine.training.verbs import AdapterBatch, target_logprobs
from seal_kernels.dispatch import INTERPRET
from test_decode_graph import CONFIG, adapter, make_model


def batch(owner, lengths, seed, prompt=1):
    """An adapter's sequences; the first `prompt` tokens of each are no targets."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return AdapterBatch(owner, sequences, [[i >= prompt for i in range(n)] for n in lengths])


@pytest.mark.skipif(not INTERPRET and DEVICE.type != "cuda", reason="graphs are of the Triton path")
def test_a_pass_through_a_graph_equals_the_pass():
    """Five passes of one size, with other lengths and adapters in each, then a larger one and the first size again.

    The first is computed as it is, the second is captured. Gradients add up over all of them.
    """
    model = make_model()
    graphs = PassGraphs.of(model)
    owners = [adapter(3, 1), adapter(2, 2), adapter(3, 3)]
    passes = [
        [(0, [5, 9], 1), (1, [20], 1), (2, [7], 2)],
        [(2, [3, 3], 1), (1, [33], 3)],
        [(1, [12], 1), (2, [8, 1], 1), (0, [2], 1)],
        [(0, [40, 20], 5)],
        [(2, [64], 1)],
        [(0, [70, 41], 1), (2, [9], 1)],
        [(2, [6], 1), (0, [11, 11], 1)],
    ]
    for owner in owners:
        owner.allocate_optimizer_state()
    before = [torch.zeros_like(owner.params) for owner in owners]
    for seed, parts in enumerate(passes):
        batches = [batch(owners[i], lengths, seed + i, prompt) for i, lengths, prompt in parts]
        weights = [0.5 + i for i in range(len(batches))]
        losses = graphs.backward(model, batches, weights).tolist()
        through_graph = [owner.grads.clone() for owner in owners]
        for owner, old in zip(owners, before, strict=True):
            owner.grads.copy_(old)
        logprobs, counts, _ = target_logprobs(model, batches, "none")
        expected, gradient = job_losses(logprobs, counts, weights)
        logprobs.backward(gradient)
        assert losses == pytest.approx(expected.tolist(), rel=1e-5)
        for owner, grads in zip(owners, through_graph, strict=True):
            assert owner.grads.any() == grads.any()
            assert not owner.grads.any() or relative_error(grads, owner.grads) < 1e-5
        before = [owner.grads.clone() for owner in owners]


@pytest.mark.skipif(not INTERPRET and DEVICE.type != "cuda", reason="graphs are of the Triton path")
def test_graphs_go_with_their_model():
    model = Model(CONFIG, torch.float32, DEVICE)
    graphs = weakref.ref(PassGraphs.of(model))
    assert PassGraphs.of(model) is graphs()
    del model
    gc.collect()
    assert graphs() is None


def test_sizes_of_passes():
    """At most an eighth more, 16 tokens apart up to 128, and eight sizes from each power of two to the next."""
    sizes = [padded_tokens(n) for n in range(1, 5000)]
    assert all(n <= size <= max(n + 15, n * 9 / 8) for n, size in enumerate(sizes, 1))
    assert sorted({size for size in sizes if 1024 <= size <= 2048}) == list(range(1024, 2049, 128))
    assert set(sizes[:128]) == set(range(16, 129, 16))
