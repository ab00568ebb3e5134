import pytest
import torch

from compare import DEVICE, check
from seal_kernels.linear import frozen_linear, frozen_linear_ref


@pytest.mark.parametrize("row_tile", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "I", "O"), [(1, 3, 5), (65, 280, 1009), (20, 896, 2400)])
def test_frozen_linear_equals_reference(T, I, O, dtype, row_tile):
    """float32 activations over parameters of any dtype; the last size spans several widened slices."""
    torch.manual_seed(0)
    x, dy = torch.randn(T, I, device=DEVICE), torch.randn(T, O, device=DEVICE)
    weight, bias = torch.randn(O, I, device=DEVICE).to(dtype), torch.randn(O, device=DEVICE).to(dtype)
    check(
        lambda x: frozen_linear(x, weight, bias, row_tile),
        lambda x: frozen_linear_ref(x, weight, bias),
        [x],
        [dy],
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="row tiles are for the CPU's products")
@pytest.mark.parametrize(("I", "O"), [(48, 1009), (896, 1152), (4864, 896)])
def test_in_tiles_a_rows_bits_depend_on_the_row_alone(I, O):
    """Sizes at which, without tiles, they change with the number of rows (seen with torch 2.13 on an AVX-512 CPU)."""
    torch.manual_seed(1)
    x, weight, dy = torch.randn(300, I), torch.randn(O, I), torch.randn(300, O)

    def both(rows):
        leaf = x[rows].clone().requires_grad_()
        y = frozen_linear(leaf, weight, None, 128)
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
