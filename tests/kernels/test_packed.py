"""Packed copies of frozen matrices: the product of the plain matrix, whatever happens to that one meanwhile."""

import pytest
import torch

from compare import relative_error
from seal_kernels import packed
from seal_kernels.linear import frozen_linear
from seal_kernels.packed import (
    MAX_ROWS,
    allow_packing,
    can_pack,
    fuses_swiglu,
    is_available,
    multiplies_bfloat16,
    packed_backward_product,
    packed_product,
    packed_swiglu,
    pad_rows,
    prefers_packed,
    prefers_packed_backward,
)
from seal_kernels.swiglu import swiglu, swiglu_ref

multiplies = pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
pytestmark = pytest.mark.skipif(not is_available(), reason="this torch has no oneDNN")
O, I = 640, 512  # a little more than MIN_ELEMENTS


def matrix(dtype, seed=0):
    return torch.randn(O, I, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [1, 3, 37, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_plain_product(dtype, rows, bias):
    """Against float64; in bfloat16 x and y are rounded, as in the plain product: 2^-8 each at most."""
    weight, b = matrix(dtype), torch.randn(O).to(dtype) if bias else None
    allow_packing(weight)
    x = torch.randn(rows, I)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    error = relative_error(packed_product(x, weight, b), expected)
    assert error < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("rows", [1, 37, 600])
def test_backward_equals_the_plain_product(rows):
    """Against float64, also after the matrix has changed."""
    weight, dy = matrix(torch.float32), torch.randn(rows, O)
    allow_packing(weight)
    for _ in range(2):
        assert relative_error(packed_backward_product(dy, weight), dy.double() @ weight.double()) < 1e-6
        weight.mul_(2.0)


def test_what_is_packed_for_backward(monkeypatch):
    """float32 on AMD: a gradient there goes through packed copies alone, which are counted."""
    weight, x = matrix(torch.float32), torch.randn(40, I, requires_grad=True)
    dy, allowed = torch.zeros(2, O), matrix(torch.float32)
    allow_packing(allowed)
    for amd in (False, True):
        monkeypatch.setattr(packed, "packs_all_rows", lambda amd=amd: amd)
        assert packed.num_copies(torch.float32) == 1 + amd
        assert packed.num_copies(torch.bfloat16) == 1
        assert prefers_packed_backward(dy, allowed) == amd
        assert not prefers_packed_backward(dy[:0], allowed)
        assert not prefers_packed_backward(dy.bfloat16(), allowed)
        assert not prefers_packed_backward(dy, weight), "not allowed"
        for invariant in (True, False):
            frozen_linear(x, allowed, batch_invariant=invariant).sum().backward()
            made = getattr(allowed, packed._ATTRIBUTE).transposed is not None
            assert made == (amd and not invariant), "bits that do not depend on the batch need products of one size"


@multiplies
def test_one_row_of_bfloat16_is_read_where_that_is_faster(monkeypatch):
    """On AMD from the packed copy; elsewhere from the matrix itself, and no copy is made."""
    for amd in (False, True):
        monkeypatch.setattr(packed, "packs_all_rows", lambda amd=amd: amd)
        weight, x = matrix(torch.bfloat16), torch.randn(1, I)
        allow_packing(weight)
        error = relative_error(packed_product(x, weight, None), x.double() @ weight.double().T)
        assert error < 2**-8
        assert bool(getattr(weight, packed._ATTRIBUTE).copies) == amd


@pytest.mark.parametrize("rows", [1, 8, 37, 512])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@multiplies
def test_packed_swiglu_is_nearer_to_the_truth_than_a_product_and_swiglu(rows, bias, monkeypatch):
    """It rounds silu's result and y; they round the gate's product and the up-projection's, too."""
    monkeypatch.setattr(packed, "packs_all_rows", lambda: True)
    weight, b = matrix(torch.bfloat16), torch.randn(O).bfloat16() if bias else None
    allow_packing(weight, gated=True)
    x = torch.randn(rows, I).bfloat16() / I**0.5
    assert fuses_swiglu(x, weight)
    exact = swiglu_ref(torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double()))
    fused = packed_swiglu(x, weight, b)
    assert fused.shape == (rows, O // 2)
    assert fused.dtype == torch.bfloat16
    apart = swiglu(packed_product(x, weight, b))
    assert relative_error(fused, exact) < min(2**-8, relative_error(apart, exact))


@multiplies
def test_what_packed_swiglu_multiplies(monkeypatch):
    """Rows of bfloat16 up to MAX_ROWS, one alone on AMD only; both parts' copies serve the product alone, too."""
    weight = matrix(torch.bfloat16)
    assert not fuses_swiglu(torch.zeros(8, I).bfloat16(), weight), "not allowed"
    allow_packing(weight)
    assert not fuses_swiglu(torch.zeros(8, I).bfloat16(), weight), "not a SwiGLU's"
    allow_packing(weight, gated=True)
    sizes = (0, 1, 2, MAX_ROWS, MAX_ROWS + 1)
    for amd, rows in ((False, [2, MAX_ROWS]), (True, [1, 2, MAX_ROWS])):
        monkeypatch.setattr(packed, "packs_all_rows", lambda amd=amd: amd)
        assert [n for n in sizes if fuses_swiglu(torch.zeros(n, I).bfloat16(), weight)] == rows
    assert not fuses_swiglu(torch.zeros(8, I), weight), "float32 is not rounded"
    wide = matrix(torch.float32)
    allow_packing(wide, gated=True)
    assert not fuses_swiglu(torch.zeros(8, I), wide), "it saves nothing there"
    packed_product(torch.randn(8, I), weight, None)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)  # no more copies
    packed_swiglu(torch.randn(8, I).bfloat16(), weight, None)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=multiplies)], ids=str)
def test_a_change_in_place_is_seen_and_so_is_one_through_a_view(dtype):
    """Merging an adapter writes into views of a matrix: the copy must be made again."""
    weight = matrix(dtype)
    allow_packing(weight, gated=True)
    x = torch.randn(5, I)
    before = packed_product(x, weight, None)
    weight.split([O // 2, O // 2])[1].mul_(2.0)
    after = packed_product(x, weight, None)
    assert torch.equal(after[:, : O // 2], before[:, : O // 2])
    assert relative_error(after[:, O // 2 :], 2 * before[:, O // 2 :]) < 1e-6


def test_few_numbers_of_rows_reach_onednn():
    """16 up to 16 and 8 for each power of two after it, none an eighth above what was asked for; added rows are 0."""
    sizes = [len(pad_rows(torch.ones(rows, 1))) for rows in range(1025)]
    assert len(set(sizes)) == 17 + 8 * 6
    assert all(rows <= size < rows * 9 / 8 or rows == size == 0 for rows, size in enumerate(sizes))
    assert pad_rows(torch.ones(65, 1)).sum() == 65


def test_what_is_packed(monkeypatch):
    """Only what was allowed, is large and is read on a CPU; in float32, rows for which torch's own product is slow."""
    small, large = torch.zeros(16, 16), matrix(torch.float32)
    assert not can_pack(small)
    assert not can_pack(large.T)
    assert not can_pack(large.double())
    assert not prefers_packed(torch.zeros(8, I), large), "not allowed"
    allow_packing(small)
    assert not prefers_packed(torch.zeros(8, 16), small)
    allow_packing(large)
    most = MAX_ROWS
    for amd, rows in ((False, [3, most]), (True, [1, 2, 3, most, most + 1])):
        monkeypatch.setattr(packed, "packs_all_rows", lambda amd=amd: amd)
        chosen = [n for n in (0, 1, 2, 3, most, most + 1) if prefers_packed(torch.zeros(n, I), large)]
        assert chosen == rows


def test_bfloat16_is_packed_where_the_cpu_multiplies_it(monkeypatch):
    """Elsewhere it is widened: packing it would be slow, and oneDNN refuses it without AVX-512."""
    for multiplies in (True, False):
        monkeypatch.setattr(packed, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        weight = matrix(torch.bfloat16)
        allow_packing(weight)
        assert prefers_packed(torch.zeros(8, I), weight) == multiplies == packed.packs(torch.bfloat16)
        assert packed.packs(torch.float32)


def test_batch_invariant_products_are_not_packed():
    """Their bits must not depend on the number of rows, and those of packed products do."""
    weight = matrix(torch.float32)
    allow_packing(weight)
    x = torch.randn(40, I)
    whole = frozen_linear(x, weight, batch_invariant=True)
    assert torch.equal(frozen_linear(x[:7], weight, batch_invariant=True), whole[:7])
    assert not getattr(weight, packed._ATTRIBUTE).copies, "no copy was made"
