import pytest
import torch

from compare import DEVICE, DTYPES, check
from gates import GATE_DTYPES, SM, compiles, gate
from seal_kernels.dispatch import INTERPRET
from seal_kernels.rotary import launch_config, rotary, rotary_kernel, rotary_ref


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


def angles(positions, E, dtype=torch.float32):
    """cos and sin [T, E/2] of the positions with the usual frequencies 10000^(-2i/E)."""
    frequency = 10000.0 ** (-2 * torch.arange(E // 2, dtype=torch.float64) / E)
    angle = positions.double()[:, None] * frequency
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "H", "K", "E"),
    [
        pytest.param(1, 1, 1, 2, id="one pair"),
        pytest.param(1, 32, 8, 128, id="one token"),
        pytest.param(1823, 2, 1, 40, id="many programs, heads no power of two"),
        pytest.param(57, 14, 2, 64, id="rows not a multiple of a block"),
    ],
)
def test_rotary_equals_reference(T, H, K, E, dtype):
    torch.manual_seed(0)
    q, k = randn(T, H, E, dtype=dtype), randn(T, K, E, dtype=dtype)
    dq, dk = randn(T, H, E, dtype=dtype), randn(T, K, E, dtype=dtype)
    cos, sin = angles(torch.randint(0, 100_000, (T,)), E)
    check(lambda q, k: rotary(q, k, cos, sin), lambda q, k: rotary_ref(q, k, cos, sin), [q, k], [dq, dk])


def test_heads_of_a_packed_projection_are_rotated_without_a_copy_first():
    """q and k are views [T, heads, E] into [T, W], as are the gradients that come back."""
    torch.manual_seed(1)
    T, H, K, E = 9, 5, 2, 16
    packed, grads = (randn(T, 8 + (H + K) * E, dtype=torch.float32) for _ in range(2))
    cos, sin = angles(torch.arange(T), E)

    def views(p):
        return p[:, 8 : 8 + H * E].view(T, H, E), p[:, 8 + H * E :].view(T, K, E)

    check(
        lambda p: rotary(*views(p), cos, sin),
        lambda p: rotary_ref(*views(p), cos, sin),
        [packed],
        views(grads),
    )
    q, k = rotary(*views(packed), cos, sin)
    if INTERPRET or DEVICE.type == "cuda":
        assert q.is_contiguous()
        assert k.is_contiguous()
    else:
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr(), "both are turned at once"
        assert (q.stride(), k.stride()) == (((H + K) * E, E, 1),) * 2


def test_a_gradient_that_is_not_contiguous():
    torch.manual_seed(2)
    q, k = randn(3, 2, 8, dtype=torch.float32), randn(3, 1, 8, dtype=torch.float32)
    cos, sin = angles(torch.arange(3), 8)
    total = lambda f: lambda q, k: sum(x.sum() for x in f(q, k, cos, sin))  # noqa: E731
    check(total(rotary), total(rotary_ref), [q, k], [torch.ones((), device=DEVICE)])


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(3)
    E = 40
    q, k = (randn(1, 1, E, dtype=torch.float32).expand(64, 1, E) for _ in range(2))

    def scores(first):
        turned_q, turned_k = rotary(q, k, *angles(first + torch.arange(64), E))
        return turned_q[:, 0] @ turned_k[:, 0].T

    near, far = scores(0), scores(1000)
    torch.testing.assert_close(near, far, rtol=0, atol=2e-5)
    for distance in (-5, 0, 9):
        diagonal = near.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5)
    assert not torch.allclose(near[0], near[0, 0], atol=1e-2), "and they do depend on the distance"


def test_rotation_by_zero_is_the_identity():
    torch.manual_seed(4)
    q, k = randn(7, 3, 40, dtype=torch.float32), randn(7, 1, 40, dtype=torch.float32)
    turned = rotary(q, k, *angles(torch.zeros(7), 40))
    assert torch.equal(turned[0], q)
    assert torch.equal(turned[1], k)


def test_backward_undoes_forward():
    torch.manual_seed(5)
    q, k = (randn(7, heads, 40, dtype=torch.float32).requires_grad_() for heads in (3, 1))
    turned = rotary(q, k, *angles(torch.arange(7), 40))
    torch.autograd.backward(turned, [x.detach() for x in turned])
    for x in (q, k):
        torch.testing.assert_close(x.grad, x.detach(), rtol=1e-5, atol=1e-6)


def test_other_angles_turn_otherwise():
    """What the CPU keeps of the angles of one call serves the next only if both of its tensors are the same."""
    q, k = randn(5, 2, 8, dtype=torch.float32), randn(5, 1, 8, dtype=torch.float32)
    (cos, sin), (other_cos, other_sin) = angles(torch.arange(5), 8), angles(torch.arange(5, 10), 8)
    for pair in ((cos, sin), (cos, other_sin), (other_cos, sin), (cos, sin)):
        for ours, truth in zip(rotary(q, k, *pair), rotary_ref(q, k, *pair), strict=True):
            torch.testing.assert_close(ours, truth)


def test_no_tokens():
    q, k = torch.zeros(0, 3, 8, device=DEVICE, requires_grad=True), torch.zeros(0, 1, 8, device=DEVICE)
    turned = rotary(q, k, *angles(torch.zeros(0), 8))
    assert [x.shape for x in turned] == [(0, 3, 8), (0, 1, 8)]
    turned[0].sum().backward()
    assert q.grad is not None


def test_a_token_of_nan_stays_in_its_place():
    torch.manual_seed(6)
    q, k = randn(4, 3, 40, dtype=torch.float32), randn(4, 2, 40, dtype=torch.float32)
    table = angles(torch.arange(4), 40)
    clean = rotary(q, k, *table)
    q[2] = k[1] = float("nan")
    dirty = rotary(q, k, *table)
    assert torch.equal(clean[0][[0, 1, 3]], dirty[0][[0, 1, 3]])
    assert torch.equal(clean[1][[0, 2, 3]], dirty[1][[0, 2, 3]])


@pytest.mark.skipif(INTERPRET or DEVICE.type == "cuda", reason="float64 is for the CPU path")
def test_float64_is_computed_in_float64():
    torch.manual_seed(7)
    q, k = (randn(5, heads, 8, dtype=torch.float64).requires_grad_() for heads in (2, 1))
    cos, sin = angles(torch.arange(5), 8, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))
    for out, want in zip(rotary(q, k, cos, sin), rotary_ref(q, k, cos, sin), strict=True):
        torch.testing.assert_close(out, want, rtol=1e-14, atol=1e-14)


def test_wrong_shapes_are_refused():
    q, k = torch.zeros(2, 3, 8, device=DEVICE), torch.zeros(2, 1, 8, device=DEVICE)
    cos, sin = angles(torch.zeros(2), 8)
    for bad in (k[:1], k[:, :, :6], k.half(), k[0]):
        with pytest.raises(ValueError, match="of one dtype"):
            rotary(q, bad, cos, sin)
    with pytest.raises(ValueError, match="even length"):
        rotary(q[..., :7], k[..., :7], cos, sin)
    with pytest.raises(ValueError, match="must be contiguous"):
        rotary(q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin)
    with pytest.raises(ValueError, match="cos"):
        rotary(q, k, cos[:1], sin)
    with pytest.raises(ValueError, match="sin"):
        rotary(q, k, cos, sin.T.contiguous().T)


@compiles
@pytest.mark.parametrize("dtype", GATE_DTYPES)
@pytest.mark.parametrize("sm", SM)
@pytest.mark.parametrize("E", [40, 128])
def test_compile_gate(E, sm, dtype):
    H, K = 32, 8
    stride = (H + 2 * K) * E
    shape = {
        "q_rows": 4096 * H,
        "k_rows": 4096 * K,
        "H": H,
        "K": K,
        "half": E // 2,
        "q_programs": 4096 * H * launch_config(E).blocks["BLOCK_E"] // 1024,
    }
    gate(
        rotary_kernel,
        sm,
        {
            **dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), dtype),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), torch.float32),
            **shape,
            **{"stride_qt": stride, "stride_qh": E, "stride_kt": stride, "stride_kh": E},
            **{"INVERSE": False, **launch_config(E).options()},
        },
    )
