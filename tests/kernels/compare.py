"""How kernel results are compared: norm of the difference over norm of the truth, in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seal_kernels.dispatch import INTERPRET

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def relative_error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth|| in float64; inf if anything is not finite."""
    out, truth = out.detach().double().cpu(), truth.detach().double().cpu()
    assert out.shape == truth.shape, (out.shape, truth.shape)
    if not out.isfinite().all():
        return float("inf")
    return ((out - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def run(fn: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of fn(*inputs) followed by the gradients of its floating inputs, given the outputs' gradients."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outs = fn(*leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    torch.autograd.backward(outs, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
    return outs + [x.grad for x in leaves if x.is_floating_point()]


def check(
    fn: Callable,
    ref: Callable,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    float32_bound: float = 1e-5,
    slack: float = 1.5,
    baseline: Callable | None = None,
) -> None:
    """fn against ref, outputs and gradients: truth is ref in float64 on the same (rounded) inputs.

    float32 must be within float32_bound. float16 and bfloat16 must be no further from the truth than slack times
    what ref itself is in that dtype (plus the rounding of one float32 sum, for where that error is zero).
    baseline: stands for ref there, where ref is wide inside and so rounds less than products of 16-bit numbers must.
    """
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    outs = run(fn, inputs, grads)
    truth = run(ref, [x.double() if x.is_floating_point() else x for x in inputs], [g.double() for g in grads])
    same_dtype = run(baseline or ref, inputs, grads) if dtype != torch.float32 else []
    for i, (out, want) in enumerate(zip(outs, truth, strict=True)):
        bound = float32_bound if dtype == torch.float32 else slack * relative_error(same_dtype[i], want) + 1e-6
        error = relative_error(out, want)
        assert error <= bound, f"output {i}: error {error:.2e}, bound {bound:.2e} ({dtype})"
