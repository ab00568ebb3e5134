"""Product with a frozen bfloat16 matrix under float32 activations, beside torch's own bfloat16 product. CPU only."""

import pytest
import torch

import measure
from seal_kernels.linear import frozen_linear
from seal_kernels.packed import multiplies_bfloat16


@pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="on a GPU the product is the vendor's alone")
@pytest.mark.parametrize("T", [64, 512, 2048])
def test_frozen_linear(benchmark, record, T):
    x, weight = torch.randn(T, 896), torch.randn(9728, 896).bfloat16()
    narrow, wide = x.bfloat16(), weight.float()
    fns = {
        "seal_kernels, bfloat16 weight": lambda: frozen_linear(x, weight),
        "torch, float32": lambda: frozen_linear(x, wide),
        "torch, bfloat16": lambda: torch.nn.functional.linear(narrow, weight),
    }
    bound = 2**-8 if multiplies_bfloat16() else 1e-5  # x and y are rounded to bfloat16, or the weight is widened
    assert (fns["seal_kernels, bfloat16 weight"]() - fns["torch, float32"]()).norm() < bound * (x @ wide.T).norm()
    for who, seconds in zip(fns, measure.side_by_side(benchmark, list(fns.values()), rounds=9), strict=True):
        record(T=T, I=896, O=9728, who=who, ms=seconds * 1e3, gflops=2 * T * 896 * 9728 / seconds / 1e9)
