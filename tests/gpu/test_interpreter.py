"""Faults planted in kernels are caught in the interpreter: programs that meet, bfloat16 that is rounded too often."""

import numpy as np
import pytest
import torch

from compare import relative_error
from seal_kernels.dispatch import INTERPRET, tl, triton

pytestmark = pytest.mark.skipif(not INTERPRET, reason="of Triton's interpreter: run with TRITON_INTERPRET=1")

if INTERPRET:
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import InterpreterBuilder

    from gpu.interpreter_bfloat16 import round_to_bfloat16, widen
    from gpu.program_order import ProgramsMeetError, random_program_order


@triton.jit
def double_kernel(x_ptr, y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


@triton.jit
def running_sum_kernel(x_ptr):
    """Program i needs what program i - 1 wrote."""
    x_ptr += tl.program_id(0)
    tl.store(x_ptr + 1, tl.load(x_ptr) + tl.load(x_ptr + 1))


@triton.jit
def masked_kernel(y_ptr, step, N, BLOCK: tl.constexpr):
    """Blocks of programs overlap; what is not masked need not."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * step + i, 1.0, mask=i < N)


@triton.jit
def wide_write_kernel(y_ptr, N: tl.constexpr):
    """Program 0 writes 8 bytes, program 1 the upper 4 of them; the others keep to themselves."""
    i = tl.program_id(0)
    if i == 0:
        tl.store(y_ptr, tl.full((), 0, tl.int64))
    else:
        tl.store(y_ptr.to(tl.pointer_type(tl.int32)) + i * N, 1)


@triton.jit
def count_kernel(count_ptr):
    tl.atomic_add(count_ptr, 1)


@triton.jit
def order_kernel(order_ptr, clock_ptr):
    """The time at which each program runs. Programs meet at the clock, on purpose."""
    now = tl.load(clock_ptr)
    tl.store(order_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), now)
    tl.store(clock_ptr, now + 1)


def test_programs_that_keep_to_themselves_pass():
    x, y = torch.randn(64), torch.zeros(64)
    with random_program_order(0):
        double_kernel[(4,)](x, y, STEP=16, BLOCK=16)
        assert torch.equal(y, 2 * x)
        double_kernel[(4,)](x, x, STEP=16, BLOCK=16)
        assert torch.equal(x, y), "in place"
        masked_kernel[(4,)](y, 10, 10, BLOCK=16)


def test_overlapping_writes_are_caught():
    x, y = torch.randn(64), torch.zeros(64)
    with random_program_order(0), pytest.raises(ProgramsMeetError, match=r"byte \d+ of y_ptr: both write"):
        double_kernel[(4,)](x, y, STEP=15, BLOCK=16)
    with random_program_order(0), pytest.raises(ProgramsMeetError, match=r"masked_kernel: programs .* both write"):
        masked_kernel[(4,)](y, 0, 1, BLOCK=16)


def test_writes_of_several_sizes_are_compared_by_their_bytes():
    with random_program_order(0):
        wide_write_kernel[(3,)](torch.zeros(9, dtype=torch.int64), N=2)
        with pytest.raises(ProgramsMeetError, match="byte 4 of y_ptr: both write"):
            wide_write_kernel[(3,)](torch.zeros(9, dtype=torch.int64), N=1)


def test_a_read_of_another_programs_write_is_caught():
    """Right in the interpreter's own order, wrong in others."""
    x = torch.arange(9.0)
    running_sum_kernel[(8,)](x)
    assert torch.equal(x, torch.arange(9.0).cumsum(0))
    with random_program_order(0), pytest.raises(ProgramsMeetError, match="reads what the second writes"):
        double_kernel[(3,)](x, x[1:], STEP=2, BLOCK=2)
    with random_program_order(0), pytest.raises(ProgramsMeetError, match="running_sum_kernel"):
        running_sum_kernel[(8,)](x)


def test_atomics_count_as_writes():
    with random_program_order(0), pytest.raises(ProgramsMeetError, match=r"count_kernel: .* both write"):
        count_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def run_in_order(seed):
    order, clock = torch.zeros(5, 7, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with random_program_order(seed, allowed={"order_kernel": "its programs tell the time"}):
        order_kernel[(5, 7)](order, clock)
    return order.flatten()


def test_a_seed_is_an_order_of_all_programs():
    order = run_in_order(1)
    assert not torch.equal(order, torch.arange(35))
    assert torch.equal(order.sort().values, torch.arange(35))
    assert torch.equal(order, run_in_order(1))
    assert not torch.equal(order, run_in_order(2))


def test_a_kernel_that_is_not_allowed_to_meet_is_caught():
    with random_program_order(0), pytest.raises(ProgramsMeetError, match="order_kernel"):
        order_kernel[(5, 7)](*(torch.zeros(n, dtype=torch.int32) for n in (35, 1)))


def test_a_launch_that_fails_leaves_nothing_behind():
    x, load = torch.zeros(4), InterpreterBuilder.create_masked_load
    with random_program_order(0):
        with pytest.raises(InterpreterError):
            double_kernel[(2,)](x, None, STEP=2, BLOCK=2)
        double_kernel[(2,)](x, x, STEP=2, BLOCK=2)
    assert InterpreterBuilder.create_masked_load is load


@triton.jit
def sum_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Row sums that are kept in DTYPE."""
    x_ptr += tl.program_id(0) * N
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, N, BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(DTYPE)
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, axis=0).to(y_ptr.dtype.element_ty))


@triton.jit
def block_sum_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Row sums over one block: Triton sums in the block's dtype."""
    x = tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, BLOCK)).to(DTYPE)
    tl.store(y_ptr + tl.program_id(0), tl.sum(x, axis=0).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    ("kernel", "N", "BLOCK"),
    [pytest.param(sum_kernel, 4096, 16, id="loop"), pytest.param(block_sum_kernel, 256, 256, id="tl.sum")],
)
def test_a_sum_in_bfloat16_is_caught(kernel, N, BLOCK):
    """As kernels are tested: it is further from the truth than torch's sum, which adds in float32."""
    torch.manual_seed(0)
    x = (torch.randn(16, N) + 1).bfloat16()
    truth, theirs = x.double().sum(1), x.sum(1)
    errors = {}
    for dtype in (tl.float32, tl.bfloat16):
        y = torch.empty(16, dtype=torch.bfloat16)
        kernel[(16,)](x, y, N, BLOCK=BLOCK, DTYPE=dtype)
        errors[dtype] = relative_error(y, truth)
    bound = 1.5 * relative_error(theirs, truth) + 1e-6
    assert errors[tl.float32] <= bound
    assert errors[tl.bfloat16] > 2 * bound


@triton.jit
def operators_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    one = tl.full((N,), 1.5, tl.bfloat16)
    tl.store(y_ptr + i, a + b)
    tl.store(y_ptr + N + i, a * b - one)
    tl.store(y_ptr + 2 * N + i, a / b)
    tl.store(y_ptr + 3 * N + i, tl.where(a < b, -a, tl.abs(b)))
    tl.store(y_ptr + 4 * N + i, tl.maximum(a, b))
    tl.store(y_ptr + 5 * N + i, tl.max(a, axis=0) + i)


def test_operators_in_bfloat16_equal_those_of_torch():
    torch.manual_seed(1)
    a, b = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    y = torch.empty(6, 256, dtype=torch.bfloat16)
    operators_kernel[(1,)](a, b, y, N=256)
    wants = a + b, a * b - 1.5, a / b, torch.where(a < b, -a, b.abs()), torch.maximum(a, b)
    wants += (a.max().float() + torch.arange(256),)
    for out, want in zip(y, wants, strict=True):
        torch.testing.assert_close(out, want.bfloat16(), rtol=0, atol=0)


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_casts_to_bfloat16_and_back_equal_those_of_torch(dtype):
    torch.manual_seed(2)
    x = (1000 * torch.randn(4096)).to(dtype)
    if dtype.is_floating_point:
        x[:1024] *= 1e-6
        x[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1 + 2**-8, 1 + 3 * 2**-8])
    narrow, back = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096, dtype=dtype)
    cast_kernel[(4,)](x, narrow, BLOCK=1024)
    cast_kernel[(4,)](narrow, back, BLOCK=1024)
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().to(dtype), rtol=0, atol=0, equal_nan=True)


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    product = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square))
    tl.store(y_ptr + square, product)


def test_a_product_in_bfloat16_is_summed_in_float32():
    torch.manual_seed(3)
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    y = torch.empty(64, 64)
    dot_kernel[(1,)](a, b, y, N=64)
    assert relative_error(y, a.double() @ b.double()) < 1e-6


def test_atomics_in_bfloat16_are_refused():
    """The interpreter would add their bits."""

    @triton.jit
    def add_kernel(y_ptr):
        tl.atomic_add(y_ptr, 1.0)

    with pytest.raises(Exception, match="atomics on bfloat16"):
        add_kernel[(1,)](torch.zeros(1, dtype=torch.bfloat16))


def test_every_bfloat16_survives_widening_and_rounding():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = widen(bits)
    is_number = ~np.isnan(wide)
    assert np.array_equal(round_to_bfloat16(wide)[is_number], bits[is_number])
    assert np.isnan(widen(round_to_bfloat16(wide[~is_number]))).all()
    assert np.isposinf(widen(round_to_bfloat16(np.array([np.finfo(np.float32).max])))).all()
