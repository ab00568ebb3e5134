"""Cross entropy against soft targets, K ids and weights per token: the three ways of every kernel."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compare import DEVICE, DTYPES, check, relative_error
from gates import GATE_DTYPES, SM, compiles, gate
from seal_kernels import cross_entropy as module
from seal_kernels import linear
from seal_kernels.cross_entropy import (
    IGNORE,
    launch_config,
    soft_logprob_kernel,
    soft_target_logprobs,
    soft_target_logprobs_ref,
    token_logprobs,
)
from seal_kernels.dispatch import INTERPRET

on_cpu_path = pytest.mark.skipif(INTERPRET or DEVICE.type == "cuda", reason="of the CPU path")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


def problem(T, D, V, K, dtype=torch.float32, scale=1.0):
    """hidden, weight, ids and weights of both signs; some ids are missing, some repeat, some have no weight."""
    hidden, weight = randn(T, D, dtype=dtype), (scale * D**-0.5 * randn(V, D)).to(dtype)
    ids, weights = torch.randint(0, V, (T, K)).to(DEVICE), randn(T, K)
    ids[1::3, -1] = IGNORE
    ids[2::5, 0] = ids[2::5, -1]
    weights[::4, 0] = 0.0
    return hidden, weight, ids, weights


def against_reference(hidden, weight, ids, weights):
    """Sums and their gradient, in float64 where the truth is; log probabilities are checked by themselves."""
    check(
        lambda h: soft_target_logprobs(h, weight, ids, weights)[0],
        lambda h: soft_target_logprobs_ref(h, weight, ids, weights)[0],
        [hidden],
        [randn(len(hidden))],
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """32 tokens a chunk at V = 61, slices of 7 words at D = 24, as on a CPU without bfloat16 instructions."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 32 * 61 * 8)
    monkeypatch.setattr(linear, "SLICE_ELEMENTS", 7 * 24)
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "V", "K"),
    [
        pytest.param(1, 1, 1, 1, id="one word"),
        pytest.param(1, 64, 1009, 20, id="one token"),
        pytest.param(97, 24, 61, 3, id="several chunks"),
        pytest.param(18, 96, 8999, 20, id="rows of two blocks"),
        pytest.param(9, 16, 37, 37, id="as many ids as words"),
    ],
)
def test_sums_equal_the_reference(T, D, V, K, dtype):
    """All logits in float64, log softmax, gather, weigh: the definition."""
    torch.manual_seed(0)
    against_reference(*problem(T, D, V, K, dtype))


def test_log_probabilities_equal_the_reference():
    """They are those of all logits, 0 where there is no id, whatever the weights; no gradient flows through them."""
    torch.manual_seed(1)
    hidden, weight, ids, weights = problem(33, 24, 61, 4)
    _, logprobs = soft_target_logprobs(hidden.requires_grad_(), weight, ids, weights)
    _, truth = soft_target_logprobs_ref(hidden.double(), weight.double(), ids, weights)
    assert not logprobs.requires_grad
    assert relative_error(logprobs, truth) < 1e-6
    assert (logprobs[ids < 0] == 0).all()


def test_one_id_of_weight_one_is_plain_cross_entropy():
    """K = 1 and weight 1: sum_t is the log probability of the target, so losses and gradients are token_logprobs'."""
    torch.manual_seed(2)
    hidden, weight, _, _ = problem(70, 24, 61, 1)
    targets = torch.randint(0, 61, (70,), device=DEVICE)
    found, truth = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    sums, logprobs = soft_target_logprobs(found, weight, targets[:, None], torch.ones(70, 1, device=DEVICE))
    plain = token_logprobs(truth, weight, targets)
    sums.sum().backward()
    plain.sum().backward()
    assert torch.equal(sums, logprobs[:, 0])
    torch.testing.assert_close(sums, plain, rtol=1e-6, atol=1e-6)
    assert found.grad is not None
    assert truth.grad is not None
    assert relative_error(found.grad, truth.grad) < 1e-6


def test_a_model_that_equals_its_target_has_no_gradient():
    """The cross entropy to a distribution over all words is least at that distribution: its gradient is rounding."""
    torch.manual_seed(3)
    hidden, weight, _, _ = problem(5, 16, 37, 1)
    ids = torch.arange(37, device=DEVICE).expand(5, 37).contiguous()
    soft = (hidden.double() @ weight.double().T).softmax(1)
    leaf = hidden.clone().requires_grad_()
    sums, _ = soft_target_logprobs(leaf, weight, ids, soft.float())
    sums.sum().backward()
    torch.testing.assert_close(sums.double(), (soft * soft.log()).sum(1), rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None
    assert leaf.grad.abs().max() < 1e-6


def test_the_gradient_of_a_certain_token_keeps_its_digits():
    """Two words, the target ahead by 18: 1 - softmax is 1.5e-8, which float32 cannot tell from 0 as a difference."""
    hidden = torch.tensor([[18.0, 0.0]], device=DEVICE, requires_grad=True)
    ids = torch.tensor([[0, IGNORE]], device=DEVICE)
    soft_target_logprobs(hidden, torch.eye(2, device=DEVICE), ids, torch.ones(1, 2, device=DEVICE))[0].sum().backward()
    p = torch.tensor(18.0, dtype=torch.float64).neg().sigmoid()
    assert hidden.grad is not None
    assert relative_error(hidden.grad, torch.stack([p, -p])[None]) < 1e-5


def test_repeated_ids_add_their_weights():
    """The same word twice with weights 2 and -0.5 is that word once with 1.5."""
    torch.manual_seed(4)
    hidden, weight, _, _ = problem(6, 16, 61, 1)
    word = torch.randint(0, 61, (6, 1), device=DEVICE)
    twice = torch.tensor([[2.0, -0.5]], device=DEVICE).expand(6, 2).contiguous()
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    first, _ = soft_target_logprobs(leaves[0], weight, word.expand(6, 2).contiguous(), twice)
    second, _ = soft_target_logprobs(leaves[1], weight, word, torch.full((6, 1), 1.5, device=DEVICE))
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)


def test_a_row_without_weight_adds_nothing_even_if_it_is_not_finite():
    torch.manual_seed(5)
    hidden, weight, ids, weights = problem(6, 16, 61, 3)
    weights[2], ids[4] = 0.0, IGNORE
    hidden[2] = hidden[4] = float("nan")
    hidden.requires_grad_()
    sums, _ = soft_target_logprobs(hidden, weight, ids, weights)
    sums.sum().backward()
    assert hidden.grad is not None
    assert sums[2] == 0
    assert (hidden.grad[[2, 4]] == 0).all()
    assert hidden.grad.isfinite().all()


@on_cpu_path
def test_float64_is_computed_in_float64():
    torch.manual_seed(6)
    hidden, weight, ids, weights = problem(6, 8, 61, 4)
    hidden, weight, weights = hidden.double().requires_grad_(), weight.double(), weights.double()
    assert torch.autograd.gradcheck(lambda h: soft_target_logprobs(h, weight, ids, weights)[0], (hidden,))


@pytest.mark.parametrize(("grad", "products"), [(False, 1), (True, 2)])
def test_flops(grad, products):
    """As for one target: a matrix product for the log probabilities and one for the gradient, whatever K is."""
    hidden, weight, ids, weights = problem(70, 24, 61, 5)
    with FlopCounterMode(display=False) as counter:
        sums, _ = soft_target_logprobs(hidden.requires_grad_(grad), weight, ids, weights)
        if grad:
            sums.sum().backward()
    assert counter.get_total_flops() == products * 2 * 70 * 24 * 61


def test_wrong_arguments_are_refused():
    hidden, weight, ids, weights = problem(4, 16, 61, 3)
    for bad in (ids[:3], ids[:, 0], ids.int(), ids[:, :0]):
        with pytest.raises(ValueError, match=r"int64 ids and weights \[T, K\]"):
            soft_target_logprobs(hidden, weight, bad, weights)
    with pytest.raises(ValueError, match=r"weights \[T, K\]"):
        soft_target_logprobs(hidden, weight, ids, weights[:, :2])
    if INTERPRET or DEVICE.type == "cuda":
        assert soft_target_logprobs(hidden, weight, ids.clamp_min(0) + 61, weights)[1].isnan().all()
    else:
        with pytest.raises(ValueError, match="in a vocabulary of 61"):
            soft_target_logprobs(hidden, weight, ids.clamp_min(0) + 61, weights)


@compiles
@pytest.mark.parametrize("dtype", GATE_DTYPES)
@pytest.mark.parametrize("sm", SM)
def test_compile_gate(sm, dtype):
    floats = dict.fromkeys(("logits_ptr", "weights_ptr", "sums_ptr", "logprobs_ptr"), torch.float32)
    pointers = {"logits_ptr": torch.float32, "ids_ptr": torch.int64, **floats, "grad_ptr": dtype}
    V, K = 152_000, 20
    sizes = {"V": V, "K": K, "GRAD": True, "BLOCK_K": 32, **launch_config(V).options()}
    gate(soft_logprob_kernel, sm, {**pointers, **sizes})
