import pytest
import torch

from compare import DEVICE, DTYPES, relative_error
from gates import ATTENTION_CASES, compiles, gate
from seal_kernels.attention import attention_ref
from seal_kernels.attention_common import head_block, launch_config
from seal_kernels.dispatch import INTERPRET, ceil_div
from seal_kernels.paged_attention import (
    SPLIT,
    paged_attention,
    paged_attention_ref,
    paged_combine_kernel,
    paged_decode_kernel,
    paged_prefill_kernel,
    write_kv,
    write_kv_kernel,
    write_kv_ref,
)
from test_attention import attention_in_dtype, packing, randn, zeros

ON_TORCH = not INTERPRET and DEVICE.type == "cpu"


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


class Paged:
    """Sequences of random tokens in caches whose blocks are dealt at random; all other places hold NaN.

    contexts: their lengths; queries: how many of the last tokens are queries; window: blocks before it are not there.
    """

    def __init__(
        self, contexts, queries, heads, key_heads, E, dtype=torch.float32, window=None, B=16, cache_dtype=None
    ):
        torch.manual_seed(0)
        self.contexts, self.queries, self.window, self.B = contexts, queries, window, B
        T, width = sum(contexts), (heads + 2 * key_heads) * E
        packed = randn(T, width + 8, dtype=dtype)[:, :width].split((heads * E, key_heads * E, key_heads * E), dim=1)
        self.q, self.k, self.v = (x.unflatten(1, (-1, E)) for x in packed)
        self.v += 2  # sums grow from block to block: with many of them, one that is kept in 16 bits is seen
        ends = torch.tensor(contexts).cumsum(0).tolist()
        # Rows of the packed stream: of all queries, and of what a sampler would have written and still keep.
        self.rows = ints([t for end, n in zip(ends, queries, strict=True) for t in range(end - n, end)], torch.int64)
        counts = [ceil_div(n, B) for n in contexts]
        blocks, M = iter(torch.randperm(sum(counts) + 3).tolist()), max(counts, default=0) + 2
        N, spare = sum(counts) + 3, 0
        tables = torch.full((len(contexts), M), -1)
        for s, count in enumerate(counts):
            tables[s, :count] = torch.tensor([next(blocks) for _ in range(count)], dtype=torch.int64)
        spare = next(blocks)  # nothing is ever written here
        slots = [
            int(tables[s, t // B]) * B + t % B for s, n in enumerate(contexts) for t in range(n)
        ]  # of every token of the stream
        if window is not None:
            for s, (n, count) in enumerate(zip(contexts, queries, strict=True)):
                tables[s, : max(n - count - window + 1, 0) // B] = spare
        tables[tables < 0] = spare
        self.tables = tables.to(DEVICE, torch.int32)
        self.caches = [torch.full((N, B, key_heads, E), float("nan"), device=DEVICE) for _ in range(2)]
        self.caches = [x.to(cache_dtype or dtype) for x in self.caches]
        self.slots = ints(slots, torch.int64)
        write_kv(self.k, self.v, *self.caches, self.slots)

    def metadata(self, only=slice(None)):
        """The arguments after q, of some of the sequences."""
        queries, contexts = self.queries[only], self.contexts[only]
        cu_seqlens, longest = packing(queries)
        return *self.caches, self.tables[only], cu_seqlens, ints(contexts), longest, max(contexts, default=0)

    def outputs(self, fn=paged_attention, only=slice(None), **options):
        bounds = [0, *torch.tensor(self.queries).cumsum(0).tolist()]
        first, last, _ = only.indices(len(self.queries))
        q = self.q[self.rows][bounds[first] : bounds[last]]
        return fn(q, *self.metadata(only), window=self.window, **options)

    def expected(self, fn, dtype=None, **options):
        """What fn makes of the whole sequences, at the queries."""
        inputs = [x if dtype is None else x.to(dtype) for x in (self.q, self.k, self.v)]
        return fn(*inputs, *packing(self.contexts), window=self.window, **options)[self.rows]

    def check(self, fn=paged_attention, **options):
        """As compare.check does, against attention on sequences that are not paged."""
        truth, out = self.expected(attention_ref, torch.float64, **options), self.outputs(fn, **options)
        bound = 1e-5
        if out.dtype != torch.float32:
            bound = 1.5 * relative_error(self.expected(attention_in_dtype, **options), truth) + 1e-6
        assert relative_error(out, truth) <= bound


CASES = {  # contexts, queries, heads, key heads, E, window
    "one token": ([1], [1], 1, 1, 16, None),
    "one token, window": ([1], [1], 4, 2, 24, 5),
    "decode": ([1, 17, 64, 100], [1] * 4, 14, 2, 64, None),
    "decode, several splits": ([SPLIT, 3 * SPLIT + 7, 5, SPLIT + 1], [1] * 4, 7, 1, 40, None),
    "decode, window": ([700, 20, 300, 301], [1] * 4, 2, 2, 64, 300),
    "decode, narrow window": ([700, 20, SPLIT + 3], [1] * 3, 4, 1, 32, 16),
    "decode, window of one": ([33, 1], [1, 1], 2, 1, 16, 1),
    "decode, large heads": ([70, 9], [1, 1], 4, 2, 128, None),
    "prefill": ([5, 33, 70], [5, 33, 70], 4, 2, 128, None),
    "prefill, 7 heads on 1": ([64, 1, 90], [64, 1, 90], 7, 1, 64, None),
    "prefill, window": ([90, 40, 16], [90, 40, 16], 3, 1, 80, 16),
    "chunk": ([100, 40, 200], [64, 7, 2], 6, 2, 40, None),
    "chunk, many blocks": ([1500], [64], 1, 1, 16, None),
    "chunk, window": ([180, 40, 230, 129], [64, 7, 100, 2], 4, 2, 96, 70),
    "mixed, with empty ones": ([0, 20, 64, 1, 0, 90, 300], [0, 1, 64, 1, 0, 13, 1], 4, 2, 40, None),
    "mixed, window": ([20, 90, 400], [1, 30, 1], 4, 2, 64, 33),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_attention_on_unpaged_sequences(case, dtype):
    *sizes, window = CASES[case]
    Paged(*sizes, dtype, window).check()


@pytest.mark.parametrize("case", ["decode", "decode, window", "chunk, window", "mixed, window"])
def test_layers_that_share(case):
    """Another layer's queries and caches, with what the first call worked out: as without."""
    *sizes, window = CASES[case]
    paged, shared = Paged(*sizes, window=window), {}
    for _ in range(3):
        assert torch.equal(paged.outputs(shared=shared), paged.outputs())
        assert bool(shared) == ON_TORCH, "small masks are kept"
        paged.q, paged.caches = -paged.q, [2 * cache for cache in reversed(paged.caches)]


@pytest.mark.skipif(not ON_TORCH, reason="how the CPU takes queries")
@pytest.mark.parametrize("case", CASES)
def test_batch_invariant_attention_equals_attention_on_unpaged_sequences(case):
    *sizes, window = CASES[case]
    paged = Paged(*sizes, window=window)
    paged.check(lambda *args, **options: paged_attention(*args, batch_invariant=True, **options))


@pytest.mark.parametrize("B", [1, 4, 64])
def test_sizes_of_blocks(B):
    Paged([70, 1, 33], [3, 1, 33], 2, 1, 16, B=B).check(scale=0.3)


@pytest.mark.parametrize("window", [None, 20])
def test_reference_equals_attention_on_unpaged_sequences(window):
    paged = Paged([0, 20, 64, 90], [0, 1, 64, 13], 4, 2, 16, window=window)
    assert relative_error(paged.outputs(paged_attention_ref), paged.expected(attention_ref, torch.float64)) < 1e-6


@pytest.mark.skipif(not ON_TORCH, reason="kernels take one dtype")
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64,) * 2]
)
def test_dtypes_of_the_cpu(dtype, cache_dtype):
    paged = Paged([40, 9], [40, 1], 4, 2, 16, dtype, cache_dtype=cache_dtype)
    if cache_dtype != dtype:  # what the cache holds is the truth
        paged.k, paged.v = (x.to(cache_dtype).to(dtype) for x in (paged.k, paged.v))
    error = relative_error(paged.outputs(), paged.expected(attention_ref, torch.float64))
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.skipif(INTERPRET, reason="as many blocks take minutes in the interpreter")
@pytest.mark.parametrize("window", [None, 900])
def test_many_blocks(window):
    Paged([1700, 1, 1500], [1200, 1, 1], 2, 1, 64, window=window).check()
    Paged([1700, 1, 1500], [1, 1, 1], 2, 1, 64, window=window).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_below_zero(dtype):
    """exp(score) is 0 here, so that a softmax that forgets to subtract the largest score divides 0 by 0."""
    paged = Paged([300, 90], [1, 40], 1, 1, 32, dtype)
    paged.q = paged.q.abs() * -40
    write_kv(paged.k.abs(), torch.ones_like(paged.v), *paged.caches, paged.slots)
    torch.testing.assert_close(paged.outputs(), torch.ones_like(paged.outputs()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_a_sequence_has_the_same_bits_alone_and_in_company(window, batch_invariant):
    """In company of NaN, too, whether the others decode or prefill, and whatever the capacities."""
    if batch_invariant and not ON_TORCH:
        pytest.skip("a mode of the CPU")
    paged = Paged([70, 300, 20, 90, 41, 65], [1, 1, 20, 60, 17, 1], 4, 2, 40, window=window)
    for x in (paged.q, paged.k, paged.v):
        x[70:390] = float("nan")
    write_kv(paged.k, paged.v, *paged.caches, paged.slots)
    options = {"batch_invariant": batch_invariant}
    together = paged.outputs(**options)
    start = 0
    for s, count in enumerate(paged.queries):
        alone = paged.outputs(only=slice(s, s + 1), **options)
        if s not in (1, 2):
            assert alone.isfinite().all()
            assert torch.equal(alone, together[start : start + count])
        start += count
    *tensors, longest, context = paged.metadata()
    q = paged.q[paged.rows]
    larger = paged_attention(q, *tensors, longest + 100, context + 1000, window=window, **options)
    assert torch.equal(larger.nan_to_num(), together.nan_to_num())


@pytest.mark.skipif(not ON_TORCH, reason="a promise of the CPU")
@pytest.mark.parametrize("window", [None, 50, 7])
@pytest.mark.parametrize(
    ("heads", "key_heads", "E", "L"),
    [
        pytest.param(1, 1, 64, 150, id="one head"),
        pytest.param(4, 2, 40, 150, id="heads no power of two"),
        pytest.param(7, 1, 64, 150, id="7 heads on 1"),
        pytest.param(14, 2, 64, 150, id="14 heads on 2"),
        pytest.param(1, 1, 64, 1100, id="one head, long"),
        pytest.param(7, 1, 64, 700, id="7 heads on 1, long"),
    ],
)
def test_batch_invariant_rows_have_the_same_bits_however_a_sequence_is_cut(heads, key_heads, E, L, window):
    """Written and read piece by piece, as the sampler does: later places of the cache are NaN until their turn."""

    def outputs(chunk):
        paged = Paged([L], [L], heads, key_heads, E, window=window)
        for cache in paged.caches:
            cache.fill_(float("nan"))
        paged.tables[:, : ceil_div(L, 16)] = paged.slots[::16] // 16
        outs = []
        for first in range(0, L, chunk):
            new = slice(first, min(first + chunk, L))
            write_kv(paged.k[new], paged.v[new], *paged.caches, paged.slots[new])
            n = new.stop - first
            args = (*paged.caches, paged.tables, ints([0, n]), ints([new.stop]), n, new.stop)
            outs.append(paged_attention(paged.q[new], *args, window=window, batch_invariant=True))
        return torch.cat(outs)

    whole = outputs(L)
    for chunk in (1, 7, 16) if L < 500 else (16, 97):
        assert torch.equal(outputs(chunk), whole)


def test_padding_of_a_captured_graph():
    """Sequences of no context have zeros, with or without queries; rows past the last sequence disturb nobody."""
    paged = Paged([30, 50], [1, 1], 4, 2, 16)
    want = paged.outputs()
    q = torch.cat([paged.q[paged.rows], randn(6, 4, 16)])
    tables = torch.cat([paged.tables, torch.full_like(paged.tables[:1].expand(3, -1), 1 << 30)])
    args = (*paged.caches, tables, ints([0, 1, 2, 3, 3, 4]), ints([30, 50, 0, 0, 0]))
    out = paged_attention(q, *args, 1, 4096)
    assert torch.equal(out[:2], want)
    assert not out[2:4].any()
    args = (*paged.caches, tables, ints([0, 1, 2, 5, 5, 7]), ints([30, 50, 0, 0, 0]))
    out = paged_attention(q, *args, 3, 60)
    assert torch.equal(out[:2], want)
    assert not out[2:7].any()


def test_nothing_to_do():
    caches = [zeros(4, 16, 2, 16) for _ in range(2)]
    tables, none = ints([[0, 1]]), ints([0])
    assert paged_attention(zeros(0, 4, 16), *caches, tables[:0], none, none[:0], 0, 0).shape == (0, 4, 16)
    assert paged_attention(zeros(0, 4, 16), *caches, tables, ints([0, 0]), none, 0, 0).shape == (0, 4, 16)
    write_kv(zeros(0, 2, 16), zeros(0, 2, 16), *caches, ints([], torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["N B K E", "N K B E", "layers"])
def test_write_kv(layout, dtype):
    """From views into a packed projection, into caches of any strides, past rows that have no slot."""
    torch.manual_seed(1)
    N, B, K, E, T = 5, 8, 3, 24, 21
    packed = randn(T, 2 * K * E + 8, dtype=dtype)
    k, v = (x.unflatten(1, (K, E)) for x in packed[:, : 2 * K * E].chunk(2, dim=1))

    def caches():
        if layout == "N K B E":
            return [zeros(N, K, B, E, dtype=dtype).transpose(1, 2) for _ in range(2)]
        if layout == "layers":
            return list(zeros(N, 2, B, K, E, dtype=dtype).unbind(1))
        return [zeros(N, B, K, E, dtype=dtype) for _ in range(2)]

    slots = torch.randperm(N * B)[:T].to(DEVICE)
    slots[torch.randperm(T)[:6]] = -1
    written, wanted = caches(), caches()
    write_kv(k, v, *written, slots)
    write_kv_ref(k, v, *wanted, slots)
    for x, want in zip(written, wanted, strict=True):
        assert torch.equal(x, want)
        assert x.any(-1).sum() == K * 15
    # And read from such caches.
    args = (*written, ints([[1, 4, 0]]), ints([0, 1]), ints([20]), 1, 20)
    q = randn(1, 6, E, dtype=dtype)
    error = relative_error(paged_attention(q, *args), paged_attention_ref(q, *args))
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_write_kv_converts(dtype):
    cache = [zeros(2, 16, 1, 16, dtype=dtype) for _ in range(2)]
    x = randn(3, 1, 16)
    write_kv(x, -x, *cache, ints([4, 31, 0], torch.int64))
    assert torch.equal(cache[0][0, 4], x[0].to(dtype))
    assert torch.equal(cache[1][1, 15], -x[1].to(dtype))


@pytest.mark.parametrize(
    ("match", "wrong"),
    [
        ("both be", {"key_cache": zeros(3, 16, 2, 8)}),
        ("both be", {"value_cache": zeros(3, 16, 2, 16, dtype=torch.float16)}),
        ("contiguous", {"key_cache": zeros(3, 16, 16, 2).transpose(2, 3)}),
        ("contiguous", {"q": zeros(5, 16, 4).transpose(1, 2)}),
        ("power of two", dict.fromkeys(("key_cache", "value_cache"), zeros(3, 12, 2, 16))),
        ("multiple of 2", {"q": zeros(5, 3, 16)}),
        ("multiple of 2", {"q": zeros(5, 4, 8)}),
        ("int32", {"block_tables": torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)}),
        ("int32", {"block_tables": torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)}),
        ("int32", {"cu_seqlens": ints([0, 5, 5])}),
        ("int32", {"context_lens": ints([[9]])}),
        ("window", {"window": 0}),
        ("scale", {"scale": 0.0}),
        ("max_query", {"max_query": -1}),
        ("devices", {"q": torch.zeros(5, 4, 16, device="meta")}),
    ],
)
def test_what_does_not_match_is_refused(match, wrong):
    caches = {"key_cache": zeros(3, 16, 2, 16), "value_cache": zeros(3, 16, 2, 16)}
    right = {"q": zeros(5, 4, 16), **caches, "block_tables": ints([[2, 0, 1]]), "cu_seqlens": ints([0, 5])}
    right |= {"context_lens": ints([9]), "max_query": 5, "max_context": 9}
    paged_attention(**right)
    with pytest.raises(ValueError, match=match):
        paged_attention(**(right | wrong))


@pytest.mark.skipif(not ON_TORCH, reason="a kernel's tensors are not read on the host")
@pytest.mark.parametrize(
    ("match", "wrong"),
    [
        ("cu_seqlens", {"cu_seqlens": ints([1, 5])}),
        ("cu_seqlens", {"cu_seqlens": ints([0, 6])}),
        ("cu_seqlens", {"max_query": 4}),
        ("context_lens", {"context_lens": ints([4])}),
        ("context_lens", {"max_context": 8}),
        ("context_lens", {"context_lens": ints([49]), "max_context": 90}),
        ("block_tables", {"block_tables": ints([[3, 0, 1]])}),
        ("block_tables", {"block_tables": ints([[-1, 0, 1]])}),
    ],
)
def test_wrong_tables_are_refused(match, wrong):
    caches = {"key_cache": zeros(3, 16, 2, 16), "value_cache": zeros(3, 16, 2, 16)}
    right = {"q": zeros(5, 4, 16), **caches, "block_tables": ints([[2, 0, 1]]), "cu_seqlens": ints([0, 5])}
    right |= {"context_lens": ints([9]), "max_query": 5, "max_context": 9}
    with pytest.raises(ValueError, match=match):
        paged_attention(**(right | wrong))


def test_wrong_writes_are_refused():
    k, caches, slots = zeros(5, 2, 16), [zeros(3, 16, 2, 16) for _ in range(2)], torch.arange(5, device=DEVICE)
    wrong = [(k[:4], k, slots), (k, k[..., :8], slots), (k, k, slots.int()), (k, k, slots[:4])]
    for args in [*wrong, (zeros(5, 16, 2).transpose(1, 2), k, slots)]:
        with pytest.raises(ValueError, match="write_kv"):
            write_kv(*args[:2], *caches, args[2])
    if ON_TORCH:
        with pytest.raises(ValueError, match="slot 48 of 48"):
            write_kv(k, k, *caches, slots + 44)


@compiles
@pytest.mark.parametrize(("E", "sm", "window", "dtype"), ATTENTION_CASES)
def test_compile_gate(E, sm, window, dtype):
    """As launched on views into a packed projection, for as many heads as Qwen2.5-7B has.

    Covered in float32 and bfloat16: sm_80, sm_90 and sm_100, heads of 64, 128 and 256 elements, with and without a
    window, each at least once but not each with each other. In bfloat16 all heads are built for sm_90, where the
    Hopper instructions are looked for.
    """
    K, group, B, W = 4, 7, 16, 36 * E
    H, capability = K * group, (sm // 10, sm % 10)
    strides = {"stride_qt": W, "stride_qh": E, "stride_ot": H * E, "stride_table": 256}
    for x in "kv":
        strides |= {f"stride_{x}b": B * K * E, f"stride_{x}o": K * E, f"stride_{x}k": E}
    pointers = dict.fromkeys(("q_ptr", "key_ptr", "value_ptr", "out_ptr"), dtype)
    integers = dict.fromkeys(("tables_ptr", "cu_seqlens_ptr", "context_lens_ptr"), torch.int32)
    sizes = {"group": group, "window": window or 0, "scale2": 0.1, "HAS_WINDOW": window is not None, "E": E, "B": B}
    parts = dict.fromkeys(("parts_ptr", "lse_ptr"), torch.float32)

    def config(kernel_name):
        return {"BLOCK_E": head_block(E), **launch_config(kernel_name, E, dtype, capability, group).options()}

    common = {**pointers, **integers, **sizes, **strides}
    matrix = dtype == torch.bfloat16
    made = gate(paged_prefill_kernel, sm, {**common, **config("prefill")}, hopper_matrix=matrix, disassemble=True)
    assert ".128" in made.sass.split("LDGSTS")[-1] if matrix else True
    for one_split in (True, False):
        gate(paged_decode_kernel, sm, {**common, **parts, "ONE_SPLIT": one_split, "SPLIT": SPLIT, **config("decode")})
    combine = {**parts, "out_ptr": dtype, "cu_seqlens_ptr": torch.int32, "context_lens_ptr": torch.int32}
    combine |= {"splits": 8, "window": window or 0, "stride_ot": H * E, "HAS_WINDOW": window is not None, "E": E}
    gate(paged_combine_kernel, sm, {**combine, "SPLIT": SPLIT, **config("combine")})
    write = {"k_ptr": dtype, "v_ptr": dtype, "key_ptr": dtype, "value_ptr": dtype, "slots_ptr": torch.int64}
    write |= {"T": 4096, "N": 1024, "K": K, "stride_kt": W, "stride_kh": E, "stride_vt": W, "stride_vh": E}
    caches = {name: x for name, x in strides.items() if name[-2] in "kv"}
    made = gate(write_kv_kernel, sm, {**write, **caches, "E": E, "B": B, **config("write")}, disassemble=True)
    assert "LDG.E.128" in made.sass
    assert "STG.E.128" in made.sass
