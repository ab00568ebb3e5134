import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from compare import DEVICE, DTYPES, relative_error
from gates import GATE_DTYPES, SM, compiles, gate
from seal_kernels.dispatch import INTERPRET, ceil_div
from seal_kernels.lora import (
    launch_config,
    lora_expand_kernel,
    lora_linear,
    lora_linear_ref,
    lora_outer_kernel,
    lora_shrink_kernel,
)
from seal_kernels.lora_cpu import keep_mask
from seal_kernels.lora_tables import LoraGroup, device_tables

ON_CPU_PATH = not INTERPRET and DEVICE.type == "cpu"


def make_group(lengths, ranks, columns, inputs, dropout=None, seed=0, aligned=False):
    """Random adapters in flat tensors with some unused space between their parts; gradients start at zero."""

    def up(n):
        return ceil_div(n, 16) * 16 if aligned else n

    generator = np.random.default_rng(seed)
    S, M = len(lengths), len(columns)
    params, offsets = [], np.zeros((S, 1 + M), dtype=np.int64)
    for s in range(S):
        at = up(3 * s)
        offsets[s, 0] = at
        at = up(at + sum(ranks[s]) * inputs + 2)
        for m, (first, last) in enumerate(columns):
            offsets[s, 1 + m] = at
            at = up(at + ranks[s][m] * (last - first) + 1)
        params.append(torch.randn(at, generator=torch.Generator().manual_seed(seed + s)).to(DEVICE))
    return LoraGroup(
        bounds=(0, *np.cumsum(lengths).tolist()),
        columns=tuple(columns),
        params=params,
        grads=[torch.zeros_like(p) for p in params],
        offsets=offsets,
        ranks=np.array(ranks, dtype=np.int64),
        scales=generator.uniform(0.5, 2.0, (S, M)),
        dropout=None if dropout is None else np.array(dropout),
        seeds=None if dropout is None else generator.integers(0, 2**32, (S, M), dtype=np.uint32),
    )


def compare(group, inputs, outputs, dtype=torch.float32, bias=True, bound=1e-5, mean=0.0):
    """y, dx, dA and dB of lora_linear against autograd through the reference in float64.

    In 16 bits they must be no further from it than 1.5 times what the reference in that dtype is.
    """
    torch.manual_seed(7)
    T = group.bounds[-1]
    x = (torch.randn(T, inputs) + mean).to(DEVICE, dtype)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(DEVICE, dtype)
    b = torch.randn(outputs).to(DEVICE, dtype) if bias else None
    dy = (torch.randn(T, outputs) + mean).to(DEVICE, dtype)
    anchor = torch.zeros(1, device=DEVICE, requires_grad=True)
    leaf = x.clone().requires_grad_()
    y = lora_linear(leaf, weight, b, group, anchor)
    y.backward(dy)

    def expected(dtype, params):
        mine = replace(group, params=[p.detach().to(params).requires_grad_() for p in group.params])
        given = x.to(dtype).requires_grad_()
        out = lora_linear_ref(given, weight.to(dtype), None if b is None else b.to(dtype), mine)
        out.backward(dy.to(dtype))
        return [out, given.grad, *(p.grad for p in mine.params)]

    truth = expected(torch.float64, torch.float64)
    same_dtype = expected(dtype, torch.float32) if dtype != torch.float32 else truth
    for got, want, rounded in zip([y, leaf.grad, *group.grads], truth, same_dtype, strict=True):
        if want is None:
            assert not got.any()
        else:
            limit = bound if dtype == torch.float32 else 1.5 * relative_error(rounded, want) + 1e-6
            assert relative_error(got, want) <= limit


QKV = [(0, 40), (40, 56), (56, 72)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "ranks"),
    [
        pytest.param([1], [[1, 1, 1]], id="one token, rank 1"),
        pytest.param(
            [5, 0, 1, 17], [[3, 0, 3], [2, 2, 2], [0, 0, 0], [17, 17, 17]], id="ranks not a multiple of 8, no tokens"
        ),
        pytest.param([130, 64, 3], [[64, 64, 64], [1, 0, 0], [0, 8, 5]], id="several blocks of tokens"),
        pytest.param([20, 33], [[128, 128, 128], [0, 0, 0]], id="several blocks of ranks, no adapter"),
        pytest.param(
            [2, 0, 65, 1, 9], [[1, 3, 17], [64, 64, 64], [128, 0, 1], [64, 128, 3], [17, 17, 17]], id="a mixture"
        ),
    ],
)
def test_lora_equals_reference(lengths, ranks, dtype):
    compare(make_group(lengths, ranks, QKV, inputs=48), inputs=48, outputs=72, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_adapters(dtype):
    """As the engine lays them out; a factor wider than a block, of columns that are no multiple of one."""
    columns = [(0, 144), (144, 160)]
    group = make_group([7, 70, 5], [[8, 16], [64, 64], [0, 8]], columns, inputs=80, aligned=True)
    tables = device_tables([group], [80], DEVICE).groups[0]
    assert tables.aligned
    assert tables.aligned_h
    compare(group, inputs=80, outputs=160, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_of_tokens(dtype):
    """Gradients are sums over many tokens that grow from block to block: one that is kept in 16 bits is seen."""
    group = make_group([1500], [[8]], [(0, 24)], inputs=128)
    group.params[0].add_(1)
    compare(group, inputs=128, outputs=24, dtype=dtype, mean=1.0)


def test_one_projection_with_many_adapters():
    S = 40 if INTERPRET else 200  # the interpreter takes some hundred milliseconds an adapter
    group = make_group([1 + s % 7 for s in range(S)], [[1 + s % 9] for s in range(S)], [(0, 33)], inputs=20)
    compare(group, inputs=20, outputs=33, bias=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[9, 30, 4], [2, 0, 140]], ids=["one block each", "several blocks, no tokens"])
def test_dropout_is_the_reference_s(lengths, dtype):
    """Forward and backward: elements are dropped by their place, in the segment's second block of tokens too."""
    group = make_group(lengths, [[4, 4], [3, 0], [2, 2]], [(0, 24), (24, 40)], 70, dropout=[0.3, 0.0, 0.9])
    compare(group, inputs=70, outputs=40, dtype=dtype)


def test_dropout_keeps_its_share_and_its_mean():
    mask = keep_mask(12345, 0.25, 400, 500)
    assert abs((mask > 0).double().mean().item() - 0.75) < 0.005
    assert abs(mask.double().mean().item() - 1) < 0.005
    assert abs(torch.corrcoef(torch.stack([mask.flatten()[:-1], mask.flatten()[1:]]))[0, 1]) < 0.01
    assert not torch.equal(mask, keep_mask(12346, 0.25, 400, 500))
    assert torch.equal(mask[:100], keep_mask(12345, 0.25, 100, 500)), "an element's draw depends on its place alone"


def test_gradients_accumulate_over_calls():
    once, twice = (make_group([5, 6], [[3, 2, 3], [4, 4, 0]], QKV, inputs=16) for _ in range(2))
    torch.manual_seed(0)
    x, weight, dy = torch.randn(11, 16).to(DEVICE), torch.randn(72, 16).to(DEVICE), torch.randn(11, 72).to(DEVICE)
    anchor = torch.zeros(1, device=DEVICE, requires_grad=True)
    lora_linear(x, weight, None, once, anchor).backward(dy)
    for _ in range(2):
        lora_linear(x, weight, None, twice, anchor).backward(dy)
    for a, b in zip(once.grads, twice.grads, strict=True):
        assert relative_error(b, 2 * a) < 1e-6


@pytest.mark.skipif(not ON_CPU_PATH, reason="a GPU's kernels add to gradients that were zeroed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [None, [0.3, 0.3]], ids=["", "dropout"])
def test_gradients_that_begin_are_written_not_added_to(dropout, dtype):
    """Whatever lies in them: with NaN there they have the bits that they have from zero. Other segments still add."""
    clean, dirty = (make_group([5, 6], [[3, 2, 3], [4, 4, 0]], QKV, 16, dropout) for _ in range(2))
    for group in (clean, dirty):
        group.grads[1].fill_(0.5)
    used = lora_grads_written(clean)
    dirty.grads[0].masked_fill_(used, torch.nan)
    torch.manual_seed(0)
    x, weight, dy = (torch.randn(*shape).to(DEVICE, dtype) for shape in [(11, 16), (72, 16), (11, 72)])
    anchor = torch.zeros(1, device=DEVICE, requires_grad=True)
    lora_linear(x, weight, None, clean, anchor).backward(dy)
    lora_linear(x, weight, None, replace(dirty, overwrite=[True, False]), anchor).backward(dy)
    assert all(torch.equal(a, b) for a, b in zip(clean.grads, dirty.grads, strict=True))
    assert clean.grads[0].any()
    assert (clean.grads[1] != 0.5).any()


def lora_grads_written(group):
    """[elements of segment 0's gradients]: whether one is of a factor, not of the unused space between factors."""
    used = torch.zeros_like(group.grads[0], dtype=torch.bool)
    a = int(group.offsets[0, 0])
    used[a : a + int(group.ranks[0].sum()) * 16] = True
    for m, (first, last) in enumerate(group.columns):
        b = int(group.offsets[0, 1 + m])
        used[b : b + int(group.ranks[0, m]) * (last - first)] = True
    return used


def test_an_adapter_of_nan_stays_in_its_segment():
    torch.manual_seed(0)
    group = make_group([5, 6, 7], [[3, 2, 3]] * 3, QKV, inputs=16)
    x, weight, dy = torch.randn(18, 16).to(DEVICE), torch.randn(72, 16).to(DEVICE), torch.randn(18, 72).to(DEVICE)
    anchor = torch.zeros(1, device=DEVICE, requires_grad=True)
    results = []
    for value in (None, float("nan")):
        if value is not None:
            group.params[1].fill_(value)
        for grad in group.grads:
            grad.zero_()
        leaf = x.clone().requires_grad_()
        y = lora_linear(leaf, weight, None, group, anchor)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, [g.clone() for g in group.grads]))
    (y, dx, grads), (y_nan, dx_nan, grads_nan) = results
    others = [*range(5), *range(11, 18)]
    assert torch.equal(y[others], y_nan[others])
    assert torch.equal(dx[others], dx_nan[others])
    assert torch.equal(grads[0], grads_nan[0])
    assert torch.equal(grads[2], grads_nan[2])
    assert y_nan[5:11].isnan().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_a_segment_has_the_same_bits_alone_and_in_company():
    """In company of NaN, of other ranks and of dropout. W is zero: its product is the vendor's."""
    lengths, ranks = [33, 70, 1, 80], [[3, 2, 0], [64, 0, 8], [8, 8, 8], [17, 128, 1]]
    group = make_group(lengths, ranks, QKV, inputs=96, dropout=[0.0, 0.0, 0.5, 0.0])
    torch.manual_seed(0)
    x, dy = torch.randn(sum(lengths), 96).to(DEVICE), torch.randn(sum(lengths), 72).to(DEVICE)
    weight, anchor = torch.zeros(72, 96, device=DEVICE), torch.zeros(1, device=DEVICE, requires_grad=True)
    group.params[1].fill_(float("nan"))

    def outputs(group, tokens):
        for grad in group.grads:
            grad.zero_()
        leaf = x[tokens].clone().requires_grad_()
        y = lora_linear(leaf, weight, None, group, anchor)
        y.backward(dy[tokens])
        return y.detach(), leaf.grad, [grad.clone() for grad in group.grads]

    y, dx, grads = outputs(group, slice(None))
    for s in (0, 2, 3):
        one, tokens = slice(s, s + 1), slice(group.bounds[s], group.bounds[s + 1])
        alone = LoraGroup(
            (0, lengths[s]), group.columns, group.params[one], group.grads[one], group.offsets[one], group.ranks[one],
            group.scales[one], group.dropout[one], group.seeds[one],
        )  # fmt: skip
        y_alone, dx_alone, grads_alone = outputs(alone, tokens)
        assert y_alone.isfinite().all()
        assert torch.equal(y_alone, y[tokens])
        assert torch.equal(dx_alone, dx[tokens])
        assert torch.equal(grads_alone[0], grads[s])


def test_what_needs_no_gradient_gets_none():
    """An adapter that is not trained, and an input, such as the embedding, that needs no gradient."""
    torch.manual_seed(0)
    group = make_group([5, 6], [[3, 2, 3], [4, 0, 1]], QKV, inputs=16)
    frozen = replace(group, grads=[None, torch.zeros_like(group.params[1])])
    x, weight, dy = torch.randn(11, 16).to(DEVICE), torch.randn(72, 16).to(DEVICE), torch.randn(11, 72).to(DEVICE)
    anchor = torch.zeros(1, device=DEVICE, requires_grad=True)
    for g in (group, frozen):
        lora_linear(x, weight, None, g, anchor).backward(dy)
    assert torch.equal(group.grads[1], frozen.grads[1])
    assert anchor.grad is None


@pytest.mark.parametrize("lengths", [[], [0, 0], [4, 3]], ids=["no segments", "no tokens", "rank 0"])
def test_nothing_to_adapt(lengths):
    group = make_group(lengths, [[0, 0, 0]] * len(lengths), QKV, inputs=16)
    x = torch.randn(sum(lengths), 16).to(DEVICE).requires_grad_()
    weight, anchor = torch.randn(72, 16).to(DEVICE), torch.zeros(1, device=DEVICE, requires_grad=True)
    group = replace(group, ranks=group.ranks.reshape(-1, 3), scales=group.scales.reshape(-1, 3))
    y = lora_linear(x, weight, None, group, anchor)
    y.sum().backward()
    assert torch.equal(y, x @ weight.T)
    assert x.grad.shape == x.shape


def test_tables_made_for_a_whole_batch():
    """Groups of different shapes share one call, one of them with dropout; results keep their bits."""
    torch.manual_seed(0)
    lengths, anchor = [5, 70, 0, 3], torch.zeros(1, device=DEVICE, requires_grad=True)
    qkv = make_group(lengths, [[3, 2, 3], [8, 0, 8], [1, 1, 1], [0, 0, 0]], QKV, inputs=16)
    down = make_group(lengths, [[9], [2], [3], [8]], [(0, 16)], inputs=40, dropout=[0.0, 0.5, 0.1, 0.0])
    tables = device_tables([qkv, down], [16, 40], DEVICE).groups
    for group, table, inputs, outputs in ((qkv, tables[0], 16, 72), (down, tables[1], 40, 16)):
        x, weight = torch.randn(78, inputs).to(DEVICE), torch.randn(outputs, inputs).to(DEVICE)
        results = []
        for g in (group, replace(group, tables=table)):
            for grad in g.grads:
                grad.zero_()
            leaf = x.clone().requires_grad_()
            y = lora_linear(leaf, weight, None, g, anchor)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(grad.clone() for grad in g.grads)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tables_of_wrong_adapters_are_refused():
    """Kernels read and write what tables point at: nothing may point elsewhere."""
    group = make_group([5, 6], [[3, 2, 3], [4, 0, 1]], QKV, inputs=16)
    short = [p[:-2] for p in group.params]
    for match, wrong in (
        ("float32", replace(group, params=[p.double() for p in group.params])),
        ("float32", replace(group, grads=[p.to("meta") for p in group.params])),
        ("contiguous", replace(group, params=[torch.zeros(2 * len(p), device=DEVICE)[::2] for p in group.params])),
        ("beyond", replace(group, params=short)),
        ("beyond", replace(group, grads=short)),
        ("beyond", replace(group, offsets=-group.offsets)),
        ("below 1", replace(group, dropout=np.array([0.5, 1.0]), seeds=np.zeros((2, 3), dtype=np.uint32))),
    ):
        with pytest.raises(ValueError, match=match):
            device_tables([wrong], [16], DEVICE)
    with pytest.raises(ValueError, match="same bounds"):
        device_tables([group, replace(group, bounds=(0, 6, 11))], [16, 16], DEVICE)


def test_wrong_shapes_are_refused():
    group = make_group([5], [[3, 2, 3]], QKV, inputs=16)
    anchor = torch.zeros(1, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="segments cover"):
        lora_linear(torch.zeros(6, 16, device=DEVICE), torch.zeros(72, 16, device=DEVICE), None, group, anchor)
    with pytest.raises(ValueError, match="weight is"):
        lora_linear(torch.zeros(5, 17, device=DEVICE), torch.zeros(72, 16, device=DEVICE), None, group, anchor)


@compiles
@pytest.mark.parametrize("dtype", GATE_DTYPES)
@pytest.mark.parametrize(
    ("sm", "aligned", "dropout"), [(90, True, False), (90, True, True), *((sm, False, True) for sm in SM)]
)
def test_compile_gate(sm, aligned, dropout, dtype):
    """The products of a 4 billion parameter model's MLP; aligned as the engine's adapters are, or the worst case."""
    for kernel_name, kernel, wide, sizes in (
        ("shrink", lora_shrink_kernel, "x", {}),
        ("expand", lora_expand_kernel, "y", {}),
        ("outer", lora_outer_kernel, "x", {"rank_blocks": 2}),
    ):
        options = launch_config(kernel_name, dtype).options()
        made = gate(
            kernel,
            sm,
            {
                **{f"{wide}_ptr": dtype, "h_ptr": dtype, "factors_ptr": torch.int64, "blocks_ptr": torch.int32},
                **{"first_factor": 2, f"stride_{wide}": 9728, "stride_h": 128, "stride_factors": 27, **sizes},
                **{"DROPOUT": dropout, "ALIGNED": aligned, "ALIGNED_H": aligned, **options},
            },
            hopper_matrix=dtype == torch.bfloat16 and kernel_name != "outer",
            disassemble=aligned,
        )
        if aligned:
            assert "128" in "".join(re.findall(r"(?:LDGSTS|LDG)\.E\S*", made.sass)), "no loads of 16 bytes"
