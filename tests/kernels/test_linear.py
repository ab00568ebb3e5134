import pytest
import torch

from compare import DEVICE, check, relative_error, run
from seal_kernels import linear
from seal_kernels.linear import frozen_linear, frozen_linear_ref


@pytest.fixture(params=[False, True], ids=["widened", "native"])
def native(request, monkeypatch):
    """Both ways to multiply by bfloat16 on a CPU, whichever this one would take."""
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["", "batch-invariant"])
def batch_invariant(request, monkeypatch):
    """Both modes; tiles are small, so that few rows are several of them."""
    monkeypatch.setattr(linear, "INVARIANT_ROWS", 16)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "I", "O"),
    [
        pytest.param(1, 3, 5, id="one row"),
        pytest.param(65, 280, 1009, id="last tile of one row"),
        pytest.param(20, 896, 2400, id="several widened slices"),
    ],
)
def test_frozen_linear_equals_reference(T, I, O, dtype, batch_invariant, native):
    """float32 activations over parameters of any dtype.

    Where bfloat16 is multiplied natively, x and y are rounded to it, once each: 2^-9 of them at most, so 2^-8.
    """
    if DEVICE.type == "cuda" and dtype != torch.float32:
        pytest.skip("on a GPU, x, y and the weight are of one dtype")
    torch.manual_seed(0)
    x, dy = torch.randn(T, I, device=DEVICE), torch.randn(T, O, device=DEVICE)
    weight, bias = torch.randn(O, I, device=DEVICE).to(dtype), torch.randn(O, device=DEVICE).to(dtype)

    def ours(x):
        return frozen_linear(x, weight, bias, batch_invariant)

    def reference(x):
        return frozen_linear_ref(x, weight, bias)

    if native and dtype == torch.bfloat16:
        for out, truth in zip(run(ours, [x], [dy]), run(reference, [x.double()], [dy.double()]), strict=True):
            assert relative_error(out, truth) < 2**-8
    else:
        check(ours, reference, [x], [dy])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU, x, y and the weight are of one dtype")
@pytest.mark.parametrize(("inner", "outer"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("T", [1, 64, 65, 700])
def test_x_and_y_may_be_of_two_dtypes(T, inner, outer, batch_invariant, native):
    """On both sides of the number of rows from which on the operands are exchanged. Three roundings of 2^-9."""
    torch.manual_seed(0)
    x, dy = torch.randn(T, 40).to(inner), torch.randn(T, 72).to(outer)
    weight, bias = torch.randn(72, 40).bfloat16(), torch.randn(72).bfloat16()
    y, dx = run(lambda x: frozen_linear(x, weight, bias, batch_invariant, outer), [x], [dy])
    assert (y.dtype, dx.dtype) == (outer, inner)
    truth = run(lambda x: frozen_linear_ref(x, weight, bias), [x.double()], [dy.double()])
    assert relative_error(y, truth[0]) < 2**-7.5
    assert relative_error(dx, truth[1]) < 2**-7.5


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a promise of the CPU")
@pytest.mark.parametrize(("I", "O"), [(48, 1009), (896, 1152), (4864, 896)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_invariant_rows_bits_depend_on_the_row_alone(I, O, dtype, native):
    """Sizes at which, without tiles, they change with the number of rows (seen with torch 2.13 on an AVX-512 CPU)."""
    torch.manual_seed(1)
    x, weight, dy = torch.randn(300, I), torch.randn(O, I).to(dtype), torch.randn(300, O)

    def both(rows):
        leaf = x[rows].clone().requires_grad_()
        y = frozen_linear(leaf, weight, None, batch_invariant=True)
        return y.detach(), torch.autograd.grad(y, leaf, dy[rows])[0]

    y, dx = both(slice(None))
    for rows in (slice(7, 8), slice(3, 23), slice(100, 231)):
        y_part, dx_part = both(rows)
        assert torch.equal(y_part, y[rows])
        assert torch.equal(dx_part, dx[rows])


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="weight is"):
        frozen_linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="bias is"):
        frozen_linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5))
