import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import seal_kernels
from compare import DEVICE, DTYPES, check, relative_error, run
from gates import GATE_DTYPES, SM, compiles, gate
from seal_kernels import cross_entropy as module
from seal_kernels import linear
from seal_kernels.cross_entropy import (
    CHUNK_BYTES,
    IGNORE,
    chunk_tokens,
    cross_entropy,
    cross_entropy_ref,
    launch_config,
    logprob_kernel,
    token_logprobs,
    token_logprobs_ref,
)
from seal_kernels.dispatch import INTERPRET

MANY = 183 if INTERPRET else 1823  # the interpreter takes milliseconds a row
on_cpu_path = pytest.mark.skipif(INTERPRET or DEVICE.type == "cuda", reason="of the CPU path")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


def problem(T, D, V, dtype=torch.float32, scale=1.0, ignored=False):
    """hidden, weight, targets of logits whose standard deviation is scale; with ignored every third has no target."""
    hidden, weight = randn(T, D, dtype=dtype), (scale * D**-0.5 * randn(V, D)).to(dtype)
    targets = torch.randint(0, V, (T,))
    if ignored:
        targets[::3] = IGNORE
        targets[::6] = -100
    return hidden, weight, targets.to(DEVICE)


@pytest.fixture
def small_chunks(monkeypatch):
    """32 tokens a chunk at V = 61 (of float32 gradients), and slices of 7 words at D = 24."""
    for name in ("CHUNK_BYTES", "CPU_CHUNK_BYTES"):
        monkeypatch.setattr(module, name, 32 * 61 * 8)
    monkeypatch.setattr(linear, "SLICE_ELEMENTS", 7 * 24)
    assert chunk_tokens(61, 4, module.CHUNK_BYTES) == 32


@pytest.fixture(autouse=True)
def widened(monkeypatch):
    """As on a CPU without matrix instructions for bfloat16."""
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "V"),
    [
        pytest.param(1, 1, 1, id="one word"),
        pytest.param(1, 64, 1009, id="one token"),
        pytest.param(MANY, 40, 37, id="several chunks"),
        pytest.param(65, 96, 8999, id="rows of two blocks"),
    ],
)
def test_token_logprobs_equal_reference(T, D, V, dtype):
    torch.manual_seed(0)
    hidden, weight, targets = problem(T, D, V, dtype)
    check(
        lambda h: token_logprobs(h, weight, targets),
        lambda h: token_logprobs_ref(h, weight, targets),
        [hidden],
        [randn(T)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_reference(weighted, dtype):
    """Loss and logprobs, with ignored tokens, token weights (some 0) and a gradient to the logprobs as well."""
    torch.manual_seed(1)
    hidden, weight, targets = problem(50, 64, 1009, dtype, ignored=True)
    token_weights = randn(50) if weighted else None
    if token_weights is not None:
        token_weights[::5] = 0
    check(
        lambda h: cross_entropy(h, weight, targets, token_weights),
        lambda h: cross_entropy_ref(h, weight, targets, token_weights),
        [hidden],
        [torch.ones((), device=DEVICE), 0.1 * randn(50)],
    )


@pytest.mark.parametrize("T", [31, 32, 33, 95, 96, 97])
def test_chunk_boundaries(T, small_chunks):
    torch.manual_seed(2)
    hidden, weight, targets = problem(T, 24, 61)
    targets[T // 2] = IGNORE
    check(
        lambda h: token_logprobs(h, weight, targets),
        lambda h: token_logprobs_ref(h, weight, targets),
        [hidden],
        [randn(T)],
    )


def test_large_logits():
    """Logits to +-50 and beyond: nothing overflows, nothing is lost where a token is certain or hopeless."""
    torch.manual_seed(3)
    hidden, weight, targets = problem(64, 16, 1009, scale=20.0)
    logits = hidden @ weight.T
    assert logits.abs().max() > 50
    targets[:16], targets[16:32] = logits[:16].argmax(1), logits[16:32].argmin(1)
    fns = [lambda h, f=f: f(h, weight, targets)[0] for f in (cross_entropy, cross_entropy_ref)]
    check(*fns, [hidden], [torch.ones((), device=DEVICE)])


def test_the_gradient_of_a_certain_token_keeps_its_digits():
    """Two words, the target ahead by 18: 1 - softmax is 1.5e-8, which float32 cannot tell from 0 as a difference."""
    hidden = torch.tensor([[18.0, 0.0]], device=DEVICE, requires_grad=True)
    weight = torch.eye(2, device=DEVICE)
    token_logprobs(hidden, weight, torch.zeros(1, dtype=torch.int64, device=DEVICE)).sum().backward()
    assert hidden.grad is not None
    p = torch.tensor(18.0, dtype=torch.float64).neg().sigmoid()
    assert relative_error(hidden.grad, torch.stack([p, -p])[None]) < 1e-5


def test_any_function_of_the_logprobs_has_the_gradient_of_full_logits():
    """A clipped importance ratio with an entropy-like term, as policy gradients use."""
    torch.manual_seed(4)
    hidden, weight, targets = problem(40, 32, 257, ignored=True)
    old, advantage = randn(40) - 5.5, randn(40)

    def loss(logprobs, dtype):
        ratio = (logprobs - old.to(dtype)).exp()
        clipped = torch.minimum(ratio * advantage.to(dtype), ratio.clamp(0.8, 1.2) * advantage.to(dtype))
        return (clipped + 0.1 * logprobs.exp() * logprobs).masked_fill(targets < 0, 0.0).square().mean().sqrt()

    check(
        lambda h: loss(token_logprobs(h, weight, targets), torch.float32),
        lambda h: loss(token_logprobs_ref(h, weight, targets), h.dtype),
        [hidden],
        [torch.ones((), device=DEVICE)],
    )


def test_a_token_without_target_or_weight_adds_nothing():
    torch.manual_seed(5)
    hidden, weight, targets = problem(9, 16, 61)
    targets[1], targets[2] = IGNORE, -100
    token_weights = torch.ones(9, device=DEVICE)
    token_weights[3:5] = 0
    hidden[2] = hidden[4] = float("nan")
    leaf = hidden.clone().requires_grad_()
    loss, logprobs = cross_entropy(leaf, weight, targets, token_weights)
    loss.backward()
    assert leaf.grad is not None
    assert (leaf.grad[1:5] == 0).all()
    assert (logprobs[1:3] == 0).all()
    assert logprobs[4].isnan()
    kept = [0, 5, 6, 7, 8]
    torch.testing.assert_close(loss, cross_entropy_ref(hidden[kept], weight, targets[kept])[0] * 5)
    assert leaf.grad[kept].isfinite().all()


def test_a_row_of_nan_stays_in_its_row():
    torch.manual_seed(6)
    hidden, weight, targets = problem(4, 16, 61)

    def both(hidden):
        leaf = hidden.clone().requires_grad_()
        logprobs = token_logprobs(leaf, weight, targets)
        logprobs.sum().backward()
        return torch.cat([logprobs.detach()[:, None], leaf.grad], 1)

    clean = both(hidden)
    hidden[2] = float("nan")
    dirty = both(hidden)
    assert torch.equal(clean[[0, 1, 3]], dirty[[0, 1, 3]])
    assert dirty[2].isnan().all()


@pytest.mark.parametrize("T", [0, 5])
def test_no_targets(T):
    hidden, weight, _ = problem(T, 16, 61)
    hidden.requires_grad_()
    targets = torch.full((T,), IGNORE, device=DEVICE)
    for token_weights in (None, torch.ones(T, device=DEVICE)):
        loss, logprobs = cross_entropy(hidden, weight, targets, token_weights)
        assert loss == 0
        assert logprobs.shape == (T,)
        assert (logprobs == 0).all()
        (grad,) = torch.autograd.grad(loss, hidden)
        assert grad.shape == hidden.shape
        assert (grad == 0).all()


def test_views_as_inputs():
    """hidden and targets are columns of larger tensors, weight is a transposed one."""
    torch.manual_seed(7)
    wide, weight = randn(9, 30), randn(24, 61).T
    targets = torch.randint(0, 61, (9, 2), device=DEVICE)[:, 1]
    check(
        lambda w: token_logprobs(w[:, 3:27], weight, targets),
        lambda w: token_logprobs_ref(w[:, 3:27], weight, targets),
        [wide],
        [randn(9)],
    )


@on_cpu_path
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_is_widened_by_slices(weight_dtype, small_chunks):
    torch.manual_seed(8)
    hidden, weight, targets = problem(70, 24, 61, ignored=True)
    weight = weight.to(weight_dtype)
    check(
        lambda h: token_logprobs(h, weight, targets),
        lambda h: token_logprobs_ref(h, weight, targets),
        [hidden],
        [randn(70)],
    )


@on_cpu_path
def test_native_bfloat16(small_chunks, monkeypatch):
    """Logits and their gradient are rounded to bfloat16, 2^-9 of them at most each: logprobs and gradients to 2^-7."""
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: True)
    torch.manual_seed(8)
    hidden, weight, targets = problem(70, 24, 61, ignored=True)
    weight, grad = weight.bfloat16(), randn(70)
    outs = run(lambda h: token_logprobs(h, weight, targets), [hidden], [grad])
    truths = run(lambda h: token_logprobs_ref(h, weight, targets), [hidden.double()], [grad.double()])
    for out, truth in zip(outs, truths, strict=True):
        assert 1e-4 < relative_error(out, truth) < 2**-7, "a smaller error: it was not multiplied natively"


@on_cpu_path
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32])
def test_float64_is_computed_in_float64(weight_dtype):
    torch.manual_seed(9)
    hidden, weight, targets = problem(6, 8, 61, ignored=True)
    weight = weight.to(weight_dtype)
    hidden = hidden.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, weight, targets), (hidden,))
    torch.testing.assert_close(
        token_logprobs(hidden, weight, targets), token_logprobs_ref(hidden, weight, targets), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize(("grad", "products"), [(False, 1), (True, 2)])
def test_flops(grad, products, small_chunks):
    """One matrix product for the logprobs, a second one for the gradient of whatever loss, none in backward."""
    hidden, weight, targets = problem(70, 24, 61)
    if DEVICE.type == "cpu" and not INTERPRET:
        weight = weight.half()
    with FlopCounterMode(display=False) as counter:
        logprobs = token_logprobs(hidden.requires_grad_(grad), weight, targets)
        if grad:
            logprobs.exp().sum().backward()
        with torch.no_grad():
            assert not token_logprobs(hidden, weight, targets).requires_grad
    assert counter.get_total_flops() == (products + 1) * 2 * 70 * 24 * 61


@on_cpu_path
def test_rows_without_target_are_not_computed():
    hidden, weight, targets = problem(60, 24, 61, ignored=True)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(hidden.requires_grad_(), weight, targets)[0].backward()
    assert counter.get_total_flops() == 4 * 40 * 24 * 61


@on_cpu_path
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory():
    """Forward and backward of 4096 tokens and 152000 words add under a tenth of what their float32 logits take.

    In a process of its own, by the most memory it ever had. The weight is narrow: its slices come on top.
    """
    program = """
        import torch
        from seal_kernels.cross_entropy import cross_entropy
        T, D, V = 4096, 64, 152000
        def peak():  # of this process alone: getrusage also counts the one that started it
            return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line) * 1024
        weight = torch.randn(V, D, dtype=torch.bfloat16).mul_(0.1)
        def step(rows, words):
            hidden = torch.randn(rows, D, requires_grad=True)
            cross_entropy(hidden, weight[:words], torch.randint(0, words, (rows,)))[0].backward()
        step(8, 100)
        before = peak()
        step(T, V)
        print((peak() - before) / (T * V * 4))
    """
    path = str(Path(next(iter(seal_kernels.__path__))).parent)
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=path, capture_output=True, text=True, check=True
    ).stdout
    assert 0.01 < float(out) < 0.1, "the lower bound shows that the measurement sees the chunks"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="of the GPU path")
def test_memory_of_a_gpu():
    """That of a chunk, and of a gradient per token: 0.9 GB where all logits are 10 GB."""
    T, D, V = 16384, 64, 152000
    hidden, weight, targets = problem(T, D, V, torch.bfloat16)
    hidden.requires_grad_()
    cross_entropy(hidden[:8], weight, targets[:8])[0].backward()  # the library's workspace is not of this function
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy(hidden, weight, targets)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < CHUNK_BYTES + 16 * T * D + 2**20


def test_chunk_tokens():
    assert chunk_tokens(152_000, 2, CHUNK_BYTES) == 1024
    assert chunk_tokens(10**9, 4, CHUNK_BYTES) == 16
    for V in (1, 37, 32_000, 128_256, 152_000):
        for size in (2, 4):
            tokens = chunk_tokens(V, size, CHUNK_BYTES)
            assert tokens % 16 == 0
            assert tokens * V * (4 + size) <= CHUNK_BYTES


def test_wrong_arguments_are_refused():
    hidden, weight, targets = problem(4, 16, 61)
    for bad in (hidden[0], hidden[:, :8], hidden[None]):
        with pytest.raises(ValueError, match="hidden"):
            token_logprobs(bad, weight, targets)
    for bad in (targets[:3], targets[:, None], targets.int(), targets.float()):
        with pytest.raises(ValueError, match="targets"):
            token_logprobs(hidden, weight, bad)
    with pytest.raises(ValueError, match="token_weights"):
        cross_entropy(hidden, weight, targets, torch.ones(3, device=DEVICE))
    if INTERPRET or DEVICE.type == "cuda":
        with pytest.raises(ValueError, match="one dtype"):
            token_logprobs(hidden, weight.half(), targets)
        assert token_logprobs(hidden, weight, targets + 61).isnan().all()
    else:
        with pytest.raises(ValueError, match="target 61"):
            token_logprobs(hidden, weight, torch.full_like(targets, 61))


@compiles
@pytest.mark.parametrize("dtype", GATE_DTYPES)
@pytest.mark.parametrize("sm", SM)
def test_compile_gate(sm, dtype):
    pointers = {"logits_ptr": torch.float32, "targets_ptr": torch.int64, "logprobs_ptr": torch.float32}
    V = 152_000
    gate(logprob_kernel, sm, {**pointers, "grad_ptr": dtype, "V": V, "GRAD": True, **launch_config(V).options()})
