import pytest
import torch

from compare import DEVICE, DTYPES, check, relative_error, run
from gates import GATE_DTYPES, SM, compiles, gate
from seal_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_ref,
    launch_config,
    rms_norm,
    rms_norm_backward_kernel,
    rms_norm_forward_kernel,
    rms_norm_ref,
)

EPS = 1e-5


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 3), id="rows shorter than a vector"),
        pytest.param((1, 64), id="one row"),
        pytest.param((3, 1009), id="width not a multiple of 8"),
        pytest.param((1823, 40), id="several rows per program"),
        pytest.param((5, 7, 40), id="heads of tokens"),
        pytest.param((33, 3584), id="width of a 7B model"),
    ],
)
def test_rms_norm_equals_reference(shape, dtype):
    torch.manual_seed(0)
    x, weight, dy = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype), randn(*shape, dtype=dtype)
    check(lambda x: rms_norm(x, weight, EPS), lambda x: rms_norm_ref(x, weight.to(x.dtype), EPS), [x], [dy])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 1009), (1823, 40), (33, 3584)])
def test_add_rms_norm_equals_reference(shape, dtype):
    torch.manual_seed(1)
    x, residual, dy, dh = (randn(*shape, dtype=dtype) for _ in range(4))
    weight = randn(shape[-1], dtype=dtype)
    check(
        lambda x, r: add_rms_norm(x, r, weight, EPS),
        lambda x, r: add_rms_norm_ref(x, r, weight.to(x.dtype), EPS),
        [x, residual],
        [dy, dh],
    )


def test_a_wide_residual_stream_and_narrow_products():
    """x and y in bfloat16, the sum in float32: y alone is rounded, 2^-9 at most, and dx; not the rest."""
    torch.manual_seed(3)
    x, weight = randn(33, 40, dtype=torch.bfloat16), randn(40, dtype=torch.bfloat16)
    residual, dh = randn(33, 40, dtype=torch.float32), randn(33, 40, dtype=torch.float32)
    dy = randn(33, 40, dtype=torch.bfloat16)
    y, h, dx, dresidual = run(lambda x, r: add_rms_norm(x, r, weight, EPS, torch.bfloat16), [x, residual], [dy, dh])
    assert [t.dtype for t in (y, h, dx, dresidual)] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    wide = [t.double() for t in (x, residual)]
    truth = run(lambda x, r: add_rms_norm_ref(x, r, weight.double(), EPS), wide, [dy.double(), dh.double()])
    errors = [relative_error(*pair) for pair in zip((y, h, dx, dresidual), truth, strict=True)]
    assert max(errors[0], errors[2]) < 2**-8
    assert max(errors[1], errors[3]) < 1e-6
    assert rms_norm(residual, weight, EPS, torch.bfloat16).dtype == torch.bfloat16


def test_heads_of_a_packed_projection_are_normed_without_a_copy():
    """x is a view [T, H, E] into [T, W]: rows are found by two strides."""
    torch.manual_seed(2)
    packed = randn(9, 5 * 16 + 8, dtype=torch.float32)
    weight, dy = randn(16, dtype=torch.float32), randn(9, 5, 16, dtype=torch.float32)
    view = lambda p: p[:, 8:].view(9, 5, 16)  # noqa: E731
    check(
        lambda p: rms_norm(view(p), weight, EPS),
        lambda p: rms_norm_ref(view(p), weight.to(p.dtype), EPS),
        [packed],
        [dy],
    )


def test_no_rows():
    x = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    weight = torch.ones(16, device=DEVICE)
    assert rms_norm(x, weight, EPS).shape == (0, 16)
    y, h = add_rms_norm(x, x.detach(), weight, EPS)
    (y.sum() + h.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)


def test_a_row_of_nan_stays_in_its_row():
    torch.manual_seed(3)
    x, weight = randn(4, 40, dtype=torch.float32), randn(40, dtype=torch.float32)
    clean = rms_norm(x, weight, EPS)
    x[2] = float("nan")
    dirty = rms_norm(x, weight, EPS)
    assert torch.equal(clean[[0, 1, 3]], dirty[[0, 1, 3]])


def test_wrong_shapes_are_refused():
    x = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, torch.ones(7, device=DEVICE), EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, torch.zeros(3, 8, device=DEVICE), torch.ones(8, device=DEVICE), EPS)
    with pytest.raises(ValueError, match="contiguous rows"):
        rms_norm(torch.zeros(8, 2, device=DEVICE).T, torch.ones(8, device=DEVICE), EPS)


@compiles
@pytest.mark.parametrize("dtype", GATE_DTYPES)
@pytest.mark.parametrize("sm", SM)
@pytest.mark.parametrize("D", [128, 8192])
def test_compile_gate(D, sm, dtype):
    shape = {"N": 4096, "D": D, "inner": 1, "stride_outer": D, "stride_inner": 0, **launch_config(D).options()}
    gate(
        rms_norm_forward_kernel,
        sm,
        {
            **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "h_ptr"), dtype),
            **{"rstd_ptr": torch.float32, "eps": 1e-6, "HAS_RESIDUAL": True},
            **shape,
        },
    )
    gate(
        rms_norm_backward_kernel,
        sm,
        {
            **dict.fromkeys(("dy_ptr", "dh_ptr", "h_ptr", "weight_ptr", "dx_ptr"), dtype),
            **{"rstd_ptr": torch.float32, "HAS_DH": True},
            **shape,
        },
    )
