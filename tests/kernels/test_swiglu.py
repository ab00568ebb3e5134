import pytest
import torch

from compare import DEVICE, DTYPES, check, relative_error
from gates import GATE_DTYPES, SM, compiles, gate
from seal_kernels.dispatch import INTERPRET
from seal_kernels.swiglu import launch_config, swiglu, swiglu_backward_kernel, swiglu_forward_kernel, swiglu_ref


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "F"),
    [
        pytest.param(1, 1, id="one element"),
        pytest.param(1, 64, id="one row"),
        pytest.param(3, 1009, id="width not a multiple of 8"),
        pytest.param(1823, 40, id="several rows per program"),
        pytest.param(33, 4864, id="rows of several blocks"),
    ],
)
def test_swiglu_equals_reference(T, F, dtype):
    torch.manual_seed(0)
    gate_up, dy = 3 * randn(T, 2 * F, dtype=dtype), randn(T, F, dtype=dtype)
    check(swiglu, swiglu_ref, [gate_up], [dy])


def test_rows_may_lie_apart():
    torch.manual_seed(1)
    wide, dy = randn(9, 3 + 2 * 40 + 5, dtype=torch.float32), randn(9, 40, dtype=torch.float32)
    check(lambda w: swiglu(w[:, 3:83]), lambda w: swiglu_ref(w[:, 3:83]), [wide], [dy])


def test_a_gradient_that_is_not_contiguous():
    torch.manual_seed(2)
    gate_up, dy = randn(5, 2 * 7, dtype=torch.float32), randn(7, 5, dtype=torch.float32).T
    check(swiglu, swiglu_ref, [gate_up], [dy])
    check(lambda x: swiglu(x).sum(), lambda x: swiglu_ref(x).sum(), [gate_up], [torch.ones((), device=DEVICE)])


def test_large_inputs_stay_finite():
    values = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    gate_up = torch.cartesian_prod(values, values).to(DEVICE)
    check(swiglu, swiglu_ref, [gate_up], [torch.ones(len(gate_up), 1, device=DEVICE)])
    x = gate_up.requires_grad_()
    y = swiglu(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (y[x[:, 0] == -1e4] == 0).all()
    assert torch.equal(y[x[:, 0] == 1e4], 1e4 * x[x[:, 0] == 1e4, 1:])


def test_no_rows():
    x = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    y = swiglu(x)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)


def test_a_row_of_nan_stays_in_its_row():
    torch.manual_seed(3)
    x, dy = randn(4, 40, dtype=torch.float32), randn(4, 20, dtype=torch.float32)

    def both(x):
        leaf = x.clone().requires_grad_()
        y = swiglu(leaf)
        y.backward(dy)
        return torch.cat([y, leaf.grad], 1)[[0, 1, 3]]

    clean = both(x)
    x[2] = float("nan")
    assert torch.equal(both(x), clean)


def test_only_the_input_is_saved():
    x = torch.zeros(2, 16, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_wrong_shapes_are_refused():
    for x in (torch.zeros(2, 7), torch.zeros(2, 0), torch.zeros(2, 2, 8), torch.zeros(8, 2).T):
        with pytest.raises(ValueError, match="gate_up"):
            swiglu(x.to(DEVICE))


@compiles
@pytest.mark.parametrize("dtype", GATE_DTYPES)
@pytest.mark.parametrize("sm", SM)
@pytest.mark.parametrize("F", [4864])
def test_compile_gate(F, sm, dtype):
    shape = {"T": 4096, "F": F, "stride_row": 2 * F, **launch_config(F).options()}
    gate(swiglu_forward_kernel, sm, {"gate_up_ptr": dtype, "y_ptr": dtype, **shape})
    gate(swiglu_backward_kernel, sm, {"dy_ptr": dtype, "gate_up_ptr": dtype, "dgate_up_ptr": dtype, **shape})


@pytest.mark.parametrize("F", [100, 4864])
def test_a_rows_bits_do_not_depend_on_the_other_rows(F):
    torch.manual_seed(5)
    T = 51 if INTERPRET else 1001
    gate_up, dy = torch.randn(T, 2 * F, device=DEVICE), torch.randn(T, F, device=DEVICE)

    def both(rows):
        leaf = gate_up[rows].clone().requires_grad_()
        y = swiglu(leaf, batch_invariant=True)
        return y.detach(), torch.autograd.grad(y, leaf, dy[rows])[0]

    y, grad = both(slice(None))
    assert relative_error(y, swiglu_ref(gate_up.double())) < 1e-6
    wide = gate_up.double().requires_grad_()
    truth = torch.autograd.grad(swiglu_ref(wide), wide, dy.double())[0]
    assert relative_error(grad, truth) < 1e-6
    for rows in (slice(7, 8), slice(3, 16), slice(T // 2, T - T // 4)):
        y_part, grad_part = both(rows)
        assert torch.equal(y_part, y[rows])
        assert torch.equal(grad_part, grad[rows])
