from pathlib import Path

import pytest
import torch

from compare import DEVICE, DTYPES, check, run
from gates import ATTENTION_CASES, compiles, gate
from seal_kernels.attention import (
    attention,
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_forward_kernel,
    attention_ref,
)
from seal_kernels.attention_common import head_block, launch_config
from seal_kernels.dispatch import INTERPRET


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


def packing(lengths):
    """(cu_seqlens, max_seqlen)"""
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32), max(lengths, default=0)


def attention_in_dtype(q, k, v, cu_seqlens, max_seqlen, scale=None, window=None):
    """Attention as it is usually written: products in q's dtype, softmax in float32. The baseline in 16 bits."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs = []
    for qs, ks, vs in zip(*(x.tensor_split(cu_seqlens.long()[1:-1].cpu()) for x in (q, k, v)), strict=True):
        qs, ks, vs = (x.transpose(0, 1) for x in (qs, ks, vs))
        i = torch.arange(qs.shape[1], device=q.device)
        distance = i[:, None] - i[None, :]
        hidden = (distance < 0) | (distance >= (max_seqlen + 1 if window is None else window))
        scores = (qs @ ks.transpose(1, 2) * scale).float().masked_fill(hidden, float("-inf"))
        outs.append((scores.softmax(-1).to(q.dtype) @ vs).transpose(0, 1))
    return torch.cat(outs)


def check_attention(inputs, dout, lengths, view=lambda *x: x, **options):
    """attention against its reference; view makes q, k and v of inputs."""
    args = packing(lengths)
    fns = [lambda *x, fn=fn: fn(*view(*x), *args, **options) for fn in (attention, attention_ref, attention_in_dtype)]
    check(fns[0], fns[1], inputs, [dout], baseline=fns[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "E", "window"),
    [
        pytest.param([5, 0, 1, 17], 4, 2, 16, None, id="no tokens, one token"),
        pytest.param([64, 65, 1, 127], 2, 1, 40, None, id="lengths around a block"),
        pytest.param([33, 0, 50], 7, 1, 64, None, id="7 heads on 1"),
        pytest.param([130, 20], 2, 2, 128, None, id="several blocks"),
        pytest.param([70], 1, 1, 256, None, id="largest heads"),
        pytest.param([90, 40], 2, 1, 80, 16, id="narrow window"),
        pytest.param([15, 16, 17, 48], 4, 2, 32, 16, id="lengths around the window"),
        pytest.param([99, 100, 101, 230], 1, 1, 16, 100, id="window cuts a block"),
        pytest.param([129, 200], 2, 1, 96, 64, id="window of whole blocks"),
    ],
)
def test_attention_equals_reference(lengths, heads, key_heads, E, window, dtype):
    torch.manual_seed(0)
    T = sum(lengths)
    q, dout = randn(T, heads, E, dtype=dtype), randn(T, heads, E, dtype=dtype)
    k, v = randn(T, key_heads, E, dtype=dtype), randn(T, key_heads, E, dtype=dtype)
    check_attention([q, k, v], dout, lengths, window=window)


@pytest.mark.parametrize("dtype", DTYPES[1:] if INTERPRET else DTYPES)  # blocks of float32 are small: slow there
@pytest.mark.parametrize(("lengths", "window"), [([1823], None), ([700, 1, 1122], 300)])
def test_many_blocks(lengths, window, dtype):
    """v and dout have a mean, so that sums grow from block to block: a sum that is kept in 16 bits is seen."""
    torch.manual_seed(1)
    q, k = (randn(1823, 1, 16, dtype=dtype) for _ in range(2))
    v, dout = (randn(1823, 1, 16, dtype=dtype) + 2 for _ in range(2))
    check_attention([q, k, v], dout, lengths, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_below_zero(dtype):
    """exp(score) is 0 here, so that a softmax that forgets to subtract the largest score divides 0 by 0."""
    torch.manual_seed(5)
    q, k, v = (randn(70, 1, 32, dtype=dtype) for _ in range(3))
    # A GPU subtracts before it rounds the score: the one weight is no exact 1 before it is divided by the sum, itself.
    torch.testing.assert_close(attention(q.abs() * -40, k.abs(), v, *packing([70]), window=1), v)
    torch.testing.assert_close(
        attention(q.abs() * -40, k.abs(), torch.ones_like(v), *packing([70])), torch.ones_like(v)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "window"), [([1], None), ([1], 3), ([5, 1, 70], 1), ([40, 5, 70], 16)])
def test_heads_of_a_packed_projection(lengths, window, dtype):
    """q, k and v are views [T, heads, E] into [T, W]; one gradient for all, as that of a lone token's q is zero."""
    torch.manual_seed(2)
    T, H, K, E = sum(lengths), 4, 2, 24

    def views(packed):
        q, k, v, _ = packed.split((H * E, K * E, K * E, 8), dim=1)
        return q.unflatten(1, (H, E)), k.unflatten(1, (K, E)), v.unflatten(1, (K, E))

    packed, dout = randn(T, (H + 2 * K) * E + 8, dtype=dtype), randn(T, H, E, dtype=dtype)
    check_attention([packed], dout, lengths, views, scale=0.3, window=window)


@pytest.mark.skipif(INTERPRET or DEVICE.type == "cuda", reason="float64 is for the CPU")
def test_float64():
    torch.manual_seed(3)
    inputs, (cu_seqlens, longest) = [randn(30, h, 16).double() for h in (4, 2, 2)], packing([10, 20])
    for window in (None, 4):
        outs = run(lambda *x, w=window: attention(*x, cu_seqlens, longest, window=w), inputs, [inputs[0]])
        want = run(lambda *x, w=window: attention_ref(*x, cu_seqlens, longest, window=w), inputs, [inputs[0]])
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(outs, want, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("window", [None, 16])
def test_a_sequence_is_the_same_alone_and_in_company(window, batch_invariant):
    """In company of NaN, too: nothing of a neighbour is read, not even to be multiplied by zero.

    To the bit, but for the CPU's batches of short sequences.
    """
    torch.manual_seed(4)
    lengths = [33, 70, 21, 50]
    tensors = [randn(sum(lengths), h, 40) for h in (4, 2, 2, 4)]
    for x in tensors:
        x[33:103] = float("nan")

    def outputs(lengths, tokens):
        *inputs, dout = [x[tokens] for x in tensors]
        options = {"window": window, "batch_invariant": batch_invariant}
        return run(lambda *x: attention(*x, *packing(lengths), **options), inputs, [dout])

    same = torch.equal if batch_invariant or INTERPRET or DEVICE.type == "cuda" else torch.allclose
    together = outputs(lengths, slice(None))
    for length, tokens in ((33, slice(0, 33)), (21, slice(103, 124)), (50, slice(124, 174))):
        for mine, all_of_them in zip(outputs([length], tokens), together, strict=True):
            assert mine.isfinite().all()
            assert same(mine, all_of_them[tokens])


def test_no_tokens():
    for lengths in ([], [0], [0, 0, 0]):
        leaves = [torch.zeros(0, h, 16, device=DEVICE, requires_grad=True) for h in (4, 2, 2)]
        out = attention(*leaves, *packing(lengths))
        assert out.shape == (0, 4, 16)
        out.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("match", "wrong"),
    [
        ("do not match", {"q": zeros(6, 4, 16)}),
        ("do not match", {"q": zeros(5, 4, 8)}),
        ("do not match", {"q": zeros(5, 64)}),
        ("v is", {"v": zeros(5, 2, 8)}),
        ("query heads", {"q": zeros(5, 3, 16)}),
        ("1 to 256", {"q": zeros(5, 2, 257), "k": zeros(5, 2, 257), "v": zeros(5, 2, 257)}),
        ("dtype", {"k": zeros(5, 2, 16, dtype=torch.float16)}),
        ("dtype", dict.fromkeys("qkv", zeros(5, 2, 16, dtype=torch.int32))),
        ("contiguous", {"v": zeros(5, 16, 2).transpose(1, 2)}),
        ("int32", {"cu_seqlens": torch.tensor([0, 5], device=DEVICE)}),
        ("int32", {"cu_seqlens": zeros(0, dtype=torch.int32)}),
        ("window", {"window": 0}),
        ("scale", {"scale": 0.0}),
        ("devices", {"k": torch.zeros(5, 2, 16, device="meta")}),
    ],
)
def test_what_does_not_match_is_refused(match, wrong):
    right = {"q": zeros(5, 4, 16), "k": zeros(5, 2, 16), "v": zeros(5, 2, 16)}
    right |= dict(zip(("cu_seqlens", "max_seqlen"), packing([5]), strict=True))
    attention(**right)
    with pytest.raises(ValueError, match=match):
        attention(**(right | wrong))


@pytest.mark.skipif(INTERPRET or DEVICE.type == "cuda", reason="a kernel does not read cu_seqlens on the host")
@pytest.mark.parametrize(("bounds", "longest"), [([0, 4], 5), ([1, 5], 5), ([0, 3, 2, 5], 5), ([0, 5], 4)])
def test_wrong_bounds_are_refused(bounds, longest):
    q = torch.zeros(5, 1, 16)
    with pytest.raises(ValueError, match=r"cu_seqlens|max_seqlen"):
        attention(q, q, q, torch.tensor(bounds, dtype=torch.int32), longest)


@pytest.mark.skipif(INTERPRET or DEVICE.type == "cuda", reason="measures the CPU path")
@pytest.mark.parametrize("window", [None, 100])
def test_memory_stays_far_below_a_matrix_of_scores(window):
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("the peak of resident memory is read from /proc")

    def resident(key):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) * 1024

    T = 6000
    leaves = [torch.randn(T, 1, 16, requires_grad=True) for _ in range(3)]
    small = [x.detach()[:600].requires_grad_() for x in leaves]
    attention(*small, *packing([600]), window=window).sum().backward()  # what torch allocates once, it has by now
    reset.write_text("5")
    before = resident("VmRSS")
    attention(*leaves, *packing([T]), window=window).sum().backward()
    assert resident("VmHWM") - before < T * T * 4 / 4


@compiles
@pytest.mark.parametrize(("E", "sm", "window", "dtype"), ATTENTION_CASES)
def test_compile_gate(E, sm, window, dtype):
    """As launched on views into a packed projection.

    Covered in float32 and bfloat16: sm_80, sm_90 and sm_100, heads of 64, 128 and 256 elements, with and without a
    window, each at least once but not each with each other. In bfloat16 all heads are built for sm_90, where the
    Hopper instructions are looked for.
    """
    H, K, W = 16, 4, 24 * E
    strides = dict.fromkeys(("stride_qt", "stride_kt", "stride_vt"), W)
    strides |= dict.fromkeys(("stride_qh", "stride_kh", "stride_vh"), E) | {"stride_ot": H * E}
    sizes = {"T": 4096, "group": H // K, "window": window or 0, "scale2": 0.1, "E": E, **strides}
    sizes |= {"HAS_WINDOW": window is not None, "BLOCK_E": head_block(E)}
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), dtype)
    pointers |= {"cu_seqlens_ptr": torch.int32, "lse_ptr": torch.float32}

    def compile_gate(kernel, kernel_name, **args):
        config = launch_config(kernel_name, E, dtype, (sm // 10, sm % 10))
        # dk and dv of 256 elements spill in blocks large enough for the Hopper instructions.
        matrix = dtype == torch.bfloat16 and kernel_name != "delta" and (kernel_name, E) != ("dkdv", 256)
        gate(kernel, sm, {**args, **config.options()}, hopper_matrix=matrix)

    compile_gate(attention_forward_kernel, "forward", **pointers, **sizes, out_ptr=dtype)
    delta = {"out_ptr": dtype, "dout_ptr": dtype, "delta_ptr": torch.float32, "T": 4096, "H": H, "E": E}
    compile_gate(attention_delta_kernel, "delta", **delta, BLOCK_E=head_block(E))
    backward = {**pointers, **sizes, "dout_ptr": dtype, "delta_ptr": torch.float32, "scale": 0.1}
    compile_gate(attention_dkdv_kernel, "dkdv", **backward, dk_ptr=dtype, dv_ptr=dtype, stride_gt=K * E)
    compile_gate(attention_dq_kernel, "dq", **backward, dq_ptr=dtype)
