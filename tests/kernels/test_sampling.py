import math

import numpy as np
import pytest
import torch

from compare import DEVICE, DTYPES
from gates import SM, compiles, gate
from seal_kernels.dispatch import INTERPRET
from seal_kernels.sampling import LIMIT, SCALE, launch_config, sample_kernel, sample_tokens, sample_tokens_ref, uniform

ON_TORCH = not INTERPRET and DEVICE.type == "cpu"
INF, LARGEST = math.inf, torch.finfo(torch.float32).max


def settings(N, temperature=1.0, top_k=0, top_p=1.0, seeds=None, counters=0):
    """The arguments after logits; a number stands for N of it."""
    values = (temperature, top_k, top_p, range(N) if seeds is None else seeds, counters)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.int64, torch.int64)
    return [
        torch.tensor([x] * N if isinstance(x, int | float) else list(x), dtype=dtype, device=DEVICE)
        for x, dtype in zip(values, dtypes, strict=True)
    ]


def random_settings(N, V, seed=0):
    """Every row has its own; all combinations of what is on and off occur."""
    rng = np.random.default_rng(seed)
    return settings(
        N,
        temperature=np.where(rng.random(N) < 0.15, 0.0, rng.uniform(0.2, 2.0, N)),
        top_k=np.where(rng.random(N) < 0.5, 0, rng.integers(1, V + 2, N)),
        top_p=np.where(rng.random(N) < 0.4, 1.0, rng.uniform(0.05, 1.0, N)),
        seeds=rng.integers(-(1 << 63), (1 << 63) - 1, N),
        counters=rng.integers(0, 1000, N),
    )


def check(logits, args):
    """sample_tokens against its reference."""
    tokens, logprobs = sample_tokens(logits, *args)
    want, want_logprobs = sample_tokens_ref(logits, *args)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-5, atol=1e-5, equal_nan=True)
    return tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 17, 1009, 8200 if INTERPRET else 50_000])
def test_equals_reference(V, dtype):
    torch.manual_seed(V)
    N = 24 if V < 2000 else 6 if INTERPRET else 16
    for spread in (0.1, 3.0):
        check((torch.randn(N, V) * spread).to(DEVICE, dtype), random_settings(N, V))


def adversarial(V=40):
    """Ties, forbidden tokens, huge and tiny logits, rows without a distribution."""
    torch.manual_seed(0)
    flat, few, huge = torch.zeros(V), torch.full((V,), -INF), torch.full((V,), -LARGEST)
    few[[3, 7, 30]] = torch.tensor([1.0, 1.0, -4.0])
    huge[5], huge[6] = LARGEST, LARGEST
    steps = (torch.arange(V) // 4).float()  # four of each
    zeros = torch.where(torch.arange(V) % 2 == 0, -0.0, 0.0)
    tiny = torch.randn(V) * 1e-42
    close = 100 + torch.arange(V) * 1e-5
    lone = torch.full((V,), -INF)
    lone[-1] = -1e30
    nan, inf = torch.randn(V), torch.randn(V)
    nan[9], inf[11] = math.nan, INF
    nothing = torch.full((V,), -INF)
    return torch.stack([flat, few, huge, steps, -steps, zeros, tiny, close, lone, nan, inf, nothing]).to(DEVICE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN and overflow
@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1.0, INF] + ([] if INTERPRET else [0.3, 1e30]))
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(6, 0.7), (0, 0.5)] + ([] if INTERPRET else [(0, 1.0), (1, 1.0), (6, 1.0), (0, 1e-9), (0, 0.0)]),
)
def test_adversarial_rows(temperature, top_k, top_p):
    logits = adversarial()
    for counter in range(1 if INTERPRET else 10):
        tokens = check(logits, settings(len(logits), temperature, top_k, top_p, counters=counter))
        assert tokens[-3:].tolist() == [-1, -1, -1]
        assert (tokens[:-3] >= 0).all()
        assert tokens[1].item() in (3, 7, 30)
        assert tokens[2].item() in (5, 6) or temperature >= 1e30
        assert tokens[8].item() == logits.shape[1] - 1


def test_filters_keep_ties():
    """Of 40 equal logits top-k and top-p keep all; of steps of four, whole steps."""
    N = 5 if INTERPRET else 400
    for row, top_k, top_p, kept in ((0, 1, 1.0, range(40)), (0, 0, 0.01, range(40)), (3, 6, 1.0, range(32, 40))):
        tokens, _ = sample_tokens(adversarial()[row].expand(N, -1).contiguous(), *settings(N, 1.0, top_k, top_p))
        assert set(tokens.tolist()) <= set(kept)
        assert INTERPRET or set(tokens.tolist()) == set(kept)


def test_greedy_takes_the_first_of_equals():
    torch.manual_seed(0)
    logits = torch.randint(0, 4, (50, 9000 if INTERPRET else 20_000)).float().to(DEVICE)
    logits = logits[: 4 if INTERPRET else 50]
    tokens = check(logits, settings(len(logits), temperature=0.0, top_k=3, top_p=0.5))
    assert torch.equal(tokens, (logits == 3).int().argmax(1))


def exact_distribution(x, temperature, top_k, top_p):
    """In float64, by the definitions, for logits without ties."""
    p = (x.double() / temperature).softmax(0)
    order = p.argsort(descending=True)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        p[order[1:][p[order].cumsum(0)[:-1] >= top_p]] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (12, 0.9)], ids=["no filter", "top-k", "top-p", "both"]
)
def test_draws_have_the_exact_distribution(temperature, top_k, top_p):
    """Chi-square over streams (one seed, many counters) and over seeds: below its mean plus five deviations."""
    if INTERPRET and temperature != 1.0:
        pytest.skip("a row takes some 50 ms in the interpreter")
    torch.manual_seed(1)
    x, N = torch.randn(30) * 1.5, 30 if INTERPRET else 30_000
    p = exact_distribution(x, temperature, top_k, top_p)
    logits = x.to(DEVICE).expand(N, -1).contiguous()
    for stream in ({"seeds": 7, "counters": range(N)}, {"seeds": range(N), "counters": 3}):
        tokens, logprobs = sample_tokens(logits, *settings(N, temperature, top_k, top_p, **stream))
        counts = torch.bincount(tokens.cpu(), minlength=30).double()
        assert not counts[p == 0].any()
        degrees = int((p > 0).sum()) - 1
        chi_square = ((counts - N * p).square() / (N * p))[p > 0].sum().item()
        assert chi_square < degrees + 5 * math.sqrt(2 * degrees)
        torch.testing.assert_close(logprobs.cpu(), x.log_softmax(0)[tokens.cpu()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.95), (50, 1.0), (200, 0.9)])
def test_filters_equal_those_of_transformers(top_k, top_p):
    """By which tokens ever come up: none that transformers' warpers leave out, all of those that they keep and that
    should come up with near certainty."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    N, x = 5 if INTERPRET else 20_000, torch.randn(1, 1009) * 3
    scores = x / 0.8
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    tokens, _ = sample_tokens(x.to(DEVICE).expand(N, -1).contiguous(), *settings(N, 0.8, top_k, top_p))
    p, drawn = scores[0].softmax(0), torch.zeros(1009, dtype=torch.bool)
    drawn[tokens.cpu()] = True
    assert not drawn[p == 0].any()
    assert drawn[p > 20 / N].all() or INTERPRET


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("V", [33, 5000 if INTERPRET else 50_000])
def test_a_row_has_the_same_bits_alone_and_in_company(V):
    torch.manual_seed(3)
    N = 6 if INTERPRET else 20
    logits, args = torch.randn(N, V, device=DEVICE), random_settings(N, V, seed=4)
    logits[2] = math.nan
    tokens, logprobs = sample_tokens(logits, *args)
    for rows in (*([n] for n in range(N)), range(0, N, 3), reversed(range(N))):
        rows = torch.tensor(list(rows), device=DEVICE)
        mine, mine_logprobs = sample_tokens(logits[rows], *(x[rows] for x in args))
        assert torch.equal(mine, tokens[rows])
        assert torch.equal(mine_logprobs.nan_to_num(7.0), logprobs[rows].nan_to_num(7.0))
    assert tokens.ge(0).tolist() == [n != 2 for n in range(N)]


def test_the_ends_of_the_random_numbers(monkeypatch):
    """The first and the last that there are draw the first and the last token that is kept and has any weight."""
    if not ON_TORCH:
        pytest.skip("replaces the random numbers of the CPU")
    logits = torch.tensor([[-200.0, 1.0, 2.0, -INF, 1.5, -9.0, -200.0]] * 2)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr("seal_kernels.sampling.uniform", lambda *_: ends)
    for top_k, top_p, want in ((0, 1.0, [1, 5]), (3, 1.0, [1, 4]), (0, 0.6, [2, 4]), (2, 0.6, [2, 2])):
        assert sample_tokens(logits, *settings(2, 1.0, top_k, top_p))[0].tolist() == want
        assert sample_tokens_ref(logits, *settings(2, 1.0, top_k, top_p))[0].tolist() == want


def test_random_numbers_are_uniform():
    """Along counters, along seeds that differ in either half of their bits, and jointly with the next one."""
    n = 1 << 16
    steps, none = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    streams = [(none, steps), (none - 1, steps), (steps, none), (steps << 32, none), (steps * -7919, none + 5)]
    streams += [(none, steps << 32), (steps, steps)]
    for seeds, counters in streams:
        u = uniform(seeds, counters)
        assert u.min() >= 0
        assert u.max() < 1
        assert len(u.unique()) == n
        pairs = (u * 16).long() * 16 + (u.roll(1) * 16).long()
        bits = (u * 2.0**20).long() % 256  # not the leading ones alone
        for cells in ((u * 256).long(), pairs, bits):
            counts = cells.bincount(minlength=256).double()
            assert (counts - n / 256).square().sum() / (n / 256) < 255 + 5 * math.sqrt(2 * 255)


def splitmix(state, steps):
    """Output number `steps` of the published generator, in Python's integers."""
    word = (1 << 64) - 1
    z = (state + steps * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def test_random_numbers_are_splitmix():
    """Number `counter` of the generator that begins where the first one of `seed` leads: to never change."""
    assert [splitmix(1234567, n) for n in (1, 2)] == [6457827717110365317, 3203168211198807973]
    cases = [(0, 0), (0, 1), (1, 0), (-1, 1 << 40), (-(1 << 63), (1 << 63) - 1)]
    want = [(splitmix(splitmix(seed % (1 << 64), 1), counter + 1) >> 11) * 2.0**-53 for seed, counter in cases]
    seeds, counters = (torch.tensor(x) for x in zip(*cases, strict=True))
    assert uniform(seeds, counters).tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (9000, 1.0), (12_000, 0.99)], ids=["top-p", "top-k", "both"])
def test_thresholds_among_more_logits_than_are_gathered(top_k, top_p, dtype):
    """8,192 logits are gathered; of 20,000 near ones, in bfloat16 with many equal, some 9,000 and more are kept."""
    torch.manual_seed(8)
    logits = torch.randn(3, 20_000).to(DEVICE, dtype)
    logits[2] = (logits[2] > 2.0).to(dtype)  # two values
    for temperature in (1.0, 5.0):
        check(logits, settings(3, temperature, top_k, top_p))


ROWS = {  # of 152,064 logits -> the passes over them that top-p may make
    "a few hundred likely tokens": (lambda x: torch.cat([torch.linspace(22, 8, 300), 2 * x[300:]]), 3.1),
    "one token has nearly all": (lambda x: torch.cat([torch.tensor([30.0]), 2 * x[1:]]), 2.1),
    "13,000 likely tokens": (lambda x: 3 * x, 6.0),
    "all equal": (lambda x: 0 * x, 3.0),
}


@pytest.mark.skipif(not INTERPRET, reason="counts what a kernel reads in the interpreter")
@pytest.mark.parametrize(("row", "most"), ROWS.values(), ids=ROWS)
def test_a_row_is_read_few_times(monkeypatch, row, most):
    """Bisection of the threshold's bits alone would take 20 to 34 passes. Log-probabilities take one more."""
    from triton.runtime.interpreter import InterpreterBuilder

    logits = row(torch.randn(152_064, generator=torch.Generator().manual_seed(0)))[None]
    first, load, elements = logits.data_ptr(), InterpreterBuilder.create_masked_load, 0

    def counted_load(self, pointers, mask, *args):
        nonlocal elements
        elements += int((mask.data & (first <= pointers.data) & (pointers.data < first + logits.nbytes)).sum())
        return load(self, pointers, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    args = settings(1, top_p=0.95, seeds=[3])
    tokens, logprobs = sample_tokens(logits, *args, with_logprobs=False)
    without, elements = elements, 0
    assert logprobs is None
    assert without <= most * logits.numel()
    again, _ = sample_tokens(logits, *args)
    assert elements == without + logits.numel() + 1  # and the drawn token's
    assert torch.equal(tokens, again)


@pytest.mark.skipif(ON_TORCH, reason="compares the kernel with the host")
def test_the_kernel_draws_the_same_random_numbers():
    """With 2^12 equal logits the token is the leading 12 bits."""
    N = 40 if INTERPRET else 4000
    rng = np.random.default_rng(5)
    seeds, counters = (rng.integers(-(1 << 63), (1 << 63) - 1, N) for _ in range(2))
    args = settings(N, seeds=seeds, counters=counters)
    tokens, _ = sample_tokens(torch.zeros(N, 4096, device=DEVICE), *args)
    assert torch.equal(tokens.cpu(), (uniform(*(x.cpu() for x in args[3:])) * 4096).long())


def test_logits_may_be_strided_rows():
    torch.manual_seed(6)
    wide = torch.randn(5, 300, device=DEVICE)
    check(wide[:, :211], random_settings(5, 211))


def test_no_rows():
    tokens, logprobs = sample_tokens(torch.zeros(0, 5, device=DEVICE), *settings(0))
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.parametrize("wrong", range(5))
def test_what_does_not_match_is_refused(wrong):
    logits, right = torch.zeros(3, 5, device=DEVICE), settings(3)
    names = ("temperature", "top_k", "top_p", "seeds", "counters")
    for bad in (right[wrong][:2], right[wrong].double(), right[wrong].repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match=names[wrong]):
            sample_tokens(logits, *right[:wrong], bad, *right[wrong + 1 :])


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 5, dtype=torch.int64), torch.zeros(5, 3).T]
)
def test_wrong_logits_are_refused(logits):
    with pytest.raises(ValueError, match="logits"):
        sample_tokens(logits.to(DEVICE), *settings(3))


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [152_064, 50_257, 1000])
@pytest.mark.parametrize("logprobs", [None, torch.float32], ids=["", "logprobs"])
@pytest.mark.parametrize("sm", SM)
def test_compile_gate(sm, logprobs, V, dtype):
    """Without log-probabilities, as the sampler launches it, and with them."""
    args = {"logits_ptr": dtype, "temperature_ptr": torch.float32, "top_k_ptr": torch.int32, "top_p_ptr": torch.float32}
    args |= dict.fromkeys(("seeds_ptr", "counters_ptr", "tokens_ptr"), torch.int64)
    args |= {"candidates_ptr": torch.float32, "logprobs_ptr": logprobs}
    args |= {"V": V, "stride_n": V, "SCALE": SCALE, "LIMIT": LIMIT, **launch_config(V).options()}
    made = gate(sample_kernel, sm, args, disassemble=V == 152_064)
    assert V != 152_064 or "LDG.E.128" in made.sass
