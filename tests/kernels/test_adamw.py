import numpy as np
import pytest
import torch

from compare import DEVICE, relative_error
from gates import SM, compiles, gate
from seal_kernels.adamw import LAUNCH_CONFIGS, Hyper, adamw_kernel, adamw_step, norm_kernel, square_sums_kernel
from seal_kernels.dispatch import INTERPRET

SIZES = [1, 1000, 4097, 3, 16_387 if INTERPRET else 300_001]  # the last one is several programs'


def make(sizes, seed=0):
    """(params, grads, exp_avgs, exp_avg_sqs) of a run that has begun: moments are not zero."""
    generator = torch.Generator().manual_seed(seed)
    slots = [[torch.randn(n, generator=generator) for _ in range(4)] for n in sizes]
    return [[(x.square() if i == 3 else x).to(DEVICE) for x in xs] for i, xs in enumerate(zip(*slots, strict=True))]


def make_hyper(S, max_grad_norm=None, **fixed):
    """Every slot has its own numbers."""
    spread = np.random.default_rng(1).uniform
    drawn = {
        "learning_rate": spread(1e-4, 1e-1, S).tolist(),
        "beta1": spread(0.8, 0.95, S).tolist(),
        "beta2": spread(0.95, 0.9999, S).tolist(),
        "eps": (10 ** spread(-10, -4, S)).tolist(),
        "weight_decay": spread(0.0, 0.3, S).tolist(),
        "step": [1 + 37 * s for s in range(S)],
        "max_grad_norm": [max_grad_norm] * S,
    }
    return Hyper(**(drawn | {k: [v] * S for k, v in fixed.items()}))


def clones(kinds):
    return [[x.clone() for x in tensors] for tensors in kinds]


@pytest.mark.parametrize("max_grad_norm", [None, float("inf"), 1.5], ids=["no limit", "limit inf", "some are clipped"])
def test_equals_torch(max_grad_norm):
    """torch.optim.AdamW and clip_grad_norm_, a slot at a time, from zero moments; steps need not begin at 1."""
    S, steps = len(SIZES), 6 if INTERPRET else 20
    params, *_ = make(SIZES)
    grads, m, v = ([torch.zeros_like(p) for p in params] for _ in range(3))
    hyper = make_hyper(S, max_grad_norm)
    leaves = [p.clone().requires_grad_() for p in params]
    optimizers = [
        torch.optim.AdamW(
            [leaf], lr=hyper.learning_rate[s], betas=(hyper.beta1[s], hyper.beta2[s]), eps=hyper.eps[s],
            weight_decay=hyper.weight_decay[s], foreach=False, fused=False,
        )
        for s, leaf in enumerate(leaves)
    ]  # fmt: skip
    for s, (optimizer, leaf) in enumerate(zip(optimizers, leaves, strict=True)):
        optimizer.state[leaf] = {
            "step": torch.tensor(hyper.step[s] - 1.0),
            "exp_avg": torch.zeros_like(leaf),
            "exp_avg_sq": torch.zeros_like(leaf),
        }
    torch.manual_seed(1)
    for step in range(steps):
        expected = []
        for leaf, grad, optimizer in zip(leaves, grads, optimizers, strict=True):
            grad.copy_(torch.randn(len(grad)))
            leaf.grad = grad.clone()
            limit = float("inf") if max_grad_norm is None else max_grad_norm
            expected.append(torch.nn.utils.clip_grad_norm_([leaf], limit))
            optimizer.step()
        now = Hyper(**(vars(hyper) | {"step": [first + step for first in hyper.step]}))
        norms = adamw_step(params, grads, m, v, now)
        assert relative_error(norms, torch.stack(expected)) < 1e-6
        assert not any(g.any() for g in grads)
    for s, leaf in enumerate(leaves):
        state = optimizers[s].state[leaf]
        for mine, theirs in ((params[s], leaf), (m[s], state["exp_avg"]), (v[s], state["exp_avg_sq"])):
            assert relative_error(mine, theirs) < 1e-6


def test_first_step_from_the_paper():
    """At step 1 from zero moments the update is l g / (|g| + eps), whatever the betas."""
    p, g = torch.tensor([1.0, -2.0, 3.0], device=DEVICE), torch.tensor([0.5, -0.1, 0.0], device=DEVICE)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    hyper = make_hyper(1, learning_rate=0.1, eps=0.0 + 1e-12, weight_decay=0.5, step=1)
    norms = adamw_step([p], [g], [m], [v], hyper)
    expected = torch.tensor([0.95 - 0.1, -1.9 + 0.1, 2.85], device=DEVICE)
    assert relative_error(p, expected) < 1e-6
    assert abs(norms.item() - 0.26**0.5) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "square overflows"])
def test_a_slot_of_no_finite_norm_is_left_alone(value):
    """1e30 is finite, its square is not. All other slots have the bits that they have without it."""
    clean = make(SIZES)
    dirty = clones(clean)
    before = clones(clean)
    hyper = make_hyper(len(SIZES), 1.0)
    dirty[1][2][4000] = value
    clean_norms = adamw_step(*clean, hyper)
    norms = adamw_step(*dirty, hyper)
    for s in range(len(SIZES)):
        if s == 2:
            assert value == 1e30 or not norms[s].isfinite()
            unchanged = all(torch.equal(dirty[kind][s], before[kind][s]) for kind in (0, 2, 3))
            assert unchanged == (not norms[s].isfinite())
            assert not dirty[1][s].any()
        else:
            assert torch.equal(norms[s], clean_norms[s])
            assert all(torch.equal(a[s], b[s]) for a, b in zip(dirty, clean, strict=True))


def test_a_step_is_the_same_where_the_caller_overwrites_gradients():
    """A CPU then leaves in them whatever the step made of them."""
    zeroed = make(SIZES)
    kept = clones(zeroed)
    hyper = make_hyper(len(SIZES), 1.0)
    assert torch.equal(adamw_step(*zeroed, hyper), adamw_step(*kept, hyper, zero_grads=False))
    for kind in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(zeroed[kind], kept[kind], strict=True))
    assert not any(g.any() for g in zeroed[1])
    assert INTERPRET or DEVICE.type == "cuda" or all(g.any() for g in kept[1])


def test_a_slot_has_the_same_bits_alone_and_in_company():
    together, alone = make(SIZES), make(SIZES)
    hyper = make_hyper(len(SIZES), 1.5)
    norms = adamw_step(*together, hyper)
    for s in range(len(SIZES)):
        mine = [[kind[s]] for kind in alone]
        norm = adamw_step(*mine, Hyper(**{k: [x[s]] for k, x in vars(hyper).items()}))
        assert torch.equal(norm[0], norms[s])
        assert all(torch.equal(a[0], kind[s]) for a, kind in zip(mine, together, strict=True))


def test_tensors_need_not_be_aligned():
    whole, views = make([5000, 77]), make([5001, 78])
    for kind, (a, b) in enumerate(zip(whole, views, strict=True)):
        for s in range(2):
            b[s][1:] = a[s]
            views[kind][s] = b[s][1:]
    hyper = make_hyper(2, 1.0)
    adamw_step(*whole, hyper)
    adamw_step(*views, hyper)
    for a, b in zip(whole, views, strict=True):
        assert all(relative_error(y, x) < 1e-6 for x, y in zip(a[:1] + a[2:], b[:1] + b[2:], strict=False) if x.any())


def test_no_learning_rate_moves_the_moments_alone():
    tensors = make([1000])
    before = clones(tensors)
    adamw_step(*tensors, make_hyper(1, learning_rate=0.0))
    assert torch.equal(tensors[0][0], before[0][0])
    assert not torch.equal(tensors[2][0], before[2][0])
    assert not torch.equal(tensors[3][0], before[3][0])
    assert not tensors[1][0].any()


def test_no_slots_and_empty_slots():
    assert adamw_step([], [], [], [], make_hyper(0)).shape == (0,)
    assert adamw_step(*make([0]), make_hyper(1)).tolist() == [0.0]
    assert adamw_step(*make([0, 5]), make_hyper(2))[1] > 0


def test_what_does_not_match_is_refused():
    p, g, m, v = make([8, 9])
    with pytest.raises(ValueError, match="2 slots"):
        adamw_step(p, g, m, v[:1], make_hyper(2))
    with pytest.raises(ValueError, match="2 slots"):
        adamw_step(p, g, m, v, make_hyper(1))
    with pytest.raises(ValueError, match="one shape"):
        adamw_step(p, g[::-1], m, v, make_hyper(2))
    with pytest.raises(ValueError, match="float32"):
        adamw_step(p, g, m, [x.double() for x in v], make_hyper(2))
    with pytest.raises(ValueError, match="flat"):
        adamw_step(*([x.view(1, -1) for x in kind] for kind in (p, g, m, v)), make_hyper(2))
    with pytest.raises(ValueError, match="from 1"):
        adamw_step(p, g, m, v, make_hyper(2, step=0))


@compiles
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sm", SM)
def test_compile_gate(sm, aligned):
    slots, sums = {"slots_ptr": torch.int64}, {"sums_ptr": torch.float32}
    norms, numbers = {"norms_ptr": torch.float32}, {"hyper_ptr": torch.float32}
    options = {name: config.options() for name, config in LAUNCH_CONFIGS.items()}
    args = {**slots, **sums, "ALIGNED": aligned, **options["square_sums"]}
    made = gate(square_sums_kernel, sm, args, disassemble=True)
    assert ("LDG.E.128" in made.sass) == aligned
    args = {**slots, **numbers, **norms, "ALIGNED": aligned, **options["adamw"]}
    made = gate(adamw_kernel, sm, args, disassemble=True)
    assert ("LDG.E.128" in made.sass and "STG.E.128" in made.sass) == aligned
    if aligned:
        gate(norm_kernel, sm, {**slots, **sums, **norms, "programs": 256, **options["norm"]})
        gate(norm_kernel, sm, {**slots, **sums, **norms, "programs": 1, **options["norm"]})
