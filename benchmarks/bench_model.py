"""Forward and backward of a ragged batch, beside Transformers on the same parameters in the same run.

The base is frozen; gradients go to the embeddings' output, as in LoRA training. Useful FLOPs are 4 N a real token:
padding counts for nothing. Transformers runs the batch padded to its longest sequence, as its trainers do, with its
fastest attention (sdpa); ours is packed.
"""

import pytest
import torch

import measure
from seal_engine.types import PackedBatch
from seal_kernels.cross_entropy import cross_entropy
from shapes import SHAPES, random_model

CASES = [("97m", torch.float32), ("97m", torch.bfloat16)]
if measure.DEVICE.type == "cuda":
    CASES = [("97m", torch.bfloat16), ("qwen2.5-7b", torch.bfloat16)]
SEQUENCES = {"97m": 6, "qwen2.5-7b": 64}


def ragged_batch(count: int, vocab_size: int) -> list[list[int]]:
    """`count` sequences of random tokens, their lengths spread evenly from 8 to 512: half of a padded batch is real."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(8, 512, count).int()[torch.randperm(count, generator=generator)]
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths.tolist()]


def ours(model, batch):
    packed = PackedBatch.pack(batch, model.device)
    last = packed.cu_seqlens[1:].long() - 1
    targets = packed.token_ids.roll(-1).index_fill(0, last, -1)
    rows = (targets >= 0).nonzero().squeeze(1)

    def step():
        embeddings = model.embeddings(packed.token_ids).requires_grad_()
        hidden = model.hidden_states(packed, embeddings=embeddings)
        loss, _ = cross_entropy(hidden[rows], model.lm_head, targets[rows])
        loss.backward()
        return loss.detach(), embeddings.grad

    return step


def theirs(model, batch, tmp_path):
    from transformers import AutoModelForCausalLM

    from seal_engine.model.checkpoint import save_model

    save_model(model, tmp_path / "checkpoint")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=model.dtype, attn_implementation="sdpa", device_map=None
    )
    reference = reference.to(model.device).requires_grad_(False).eval()
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(batch):
        ids[i, : len(sequence)], mask[i, : len(sequence)] = torch.tensor(sequence), 1
    labels = ids.masked_fill(mask == 0, -100).to(model.device)
    ids, mask = ids.to(model.device), mask.to(model.device)

    def step():
        embeddings = reference.get_input_embeddings()(ids).requires_grad_()
        loss = reference(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), embeddings.grad[mask.bool()]

    return step


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward_backward(benchmark, record, tmp_path, shape, dtype):
    model = random_model(shape, dtype, measure.DEVICE)
    batch = ragged_batch(SEQUENCES[shape], SHAPES[shape]["vocab_size"])
    steps = {"transformers": theirs(model, batch, tmp_path), "seal_engine": ours(model, batch)}
    (loss, gradient), (their_loss, their_gradient) = steps["seal_engine"](), steps["transformers"]()
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    assert abs(loss.item() - their_loss.item()) < bound * abs(their_loss.item()), "no figure for a wrong result"
    assert (gradient.float() - their_gradient.float()).norm() < bound * their_gradient.float().norm()
    measure.matrix_rate(dtype)
    times = measure.side_by_side(benchmark, list(steps.values()), rounds=3 if dtype == torch.float32 else 2)
    rate = measure.matrix_rate(dtype)
    tokens = sum(map(len, batch))
    flops = 4 * model.config.num_matrix_parameters * tokens
    for name, seconds in zip(steps, times, strict=True):
        record(
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            who=name,
            tokens=tokens,
            ms=seconds * 1e3,
            tokens_per_s=tokens / seconds,
            useful_gflops=flops / seconds / 1e9,
            matrix_gflops=rate / 1e9,
            percent_of_matrix_rate=100 * flops / seconds / rate,
            times_faster=times[0] / seconds,
        )
