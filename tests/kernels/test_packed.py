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
    is_available,
    packed_product,
    pad_rows,
    prefers_packed,
)

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


def test_a_change_in_place_is_seen_and_so_is_one_through_a_view():
    """Merging an adapter writes into views of a matrix: the copy must be made again."""
    weight = matrix(torch.float32)
    allow_packing(weight)
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
    most = MAX_ROWS[torch.float32]
    for amd, rows in ((False, [3, most]), (True, [1, 2, 3, most, most + 1])):
        monkeypatch.setattr(packed, "_multiplies_float32_faster", lambda amd=amd: amd)
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
    assert getattr(weight, packed._ATTRIBUTE) is None, "no copy was made"
