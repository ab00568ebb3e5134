"""Completions' texts: stop texts and stop ids, streams, and what is held back because it may still change."""

from collections import defaultdict
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_cases import finish, params, random_adapter, sampler
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import oracle
from seal_engine import Engine, InputError, SamplingParams
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.sampling.detokenizer import Detokenizer

VOCABULARY = 1009
INFINITY = float("inf")
SPACE_STOP, CJK_END, WORD, CUT = 256, 257, 258, 259
PIECES = [b" stop", "東".encode()[1:] + b"x", b" word", b"ab" + "東".encode()[:1]]
END, OTHER, UNKNOWN = 260, 261, 900


@pytest.fixture(scope="module")
def talker(engine):
    """Tokens 0 .. 255 are bytes, then PIECES, then an end token and another special token; 900 has no text."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    vocabulary |= {"".join(letters[byte] for byte in piece): 256 + i for i, piece in enumerate(PIECES)}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(["<|end|>", "<|other|>"])
    tokenizer = Tokenizer(backend, {"eos_token": "<|end|>"})
    assert tokenizer.encode("a東<|end|><|other|>") == [97, *"東".encode(), END, OTHER]
    assert tokenizer.decode([97, CUT, CJK_END, WORD]) == "aab東x word"
    return Engine(engine.model, tokenizer=tokenizer)


def saying(*scripts):
    """A hook that forces these tokens, one script a request."""

    def hook(script):
        def force(tokens, logits):
            logits = torch.full_like(logits, -INFINITY)
            logits[script[len(tokens)]] = 0.0
            return logits

        return force

    return [hook(script) for script in scripts]


def say(engine, scripts, stream=False, **fields):
    own = [
        SamplingParams(logits_hook=hook, **{"max_tokens": len(script), **fields})
        for script, hook in zip(scripts, saying(*scripts), strict=True)
    ]
    prompts = [[1, 2]] * len(scripts)
    return list(engine.stream(prompts, own)) if stream else engine.generate(prompts, own, progress=False)


def said(engine, script, stops=(), stop_ids=(END,)):
    """(tokens, text, finish reason): a completion ends with the first token that completes a stop text."""
    decode = engine.tokenizer.decode
    for k, token in enumerate(script, 1):
        if token in stop_ids:
            return script[:k], decode(script[: k - 1], True, True), "stop"
        text = decode(script[:k], True, True)
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return script[:k], text[: min(found)], "stop"
    return script, decode(script, True, True), "length"


def check_said(engine, scripts, stops):
    """What generate gives, and that a stream's deltas add up to it without a character being taken back."""
    wanted = [said(engine, script, stops) for script in scripts]
    outs = say(engine, scripts, stop=stops)
    assert [(o.token_ids, o.text, o.finish_reason) for out in outs for o in out.outputs] == wanted
    streamed = defaultdict(lambda: ([], "", None))
    for delta in say(engine, scripts, stream=True, stop=stops):
        ids, text, reason = streamed[delta.request_id]
        assert reason is None, "nothing follows the end"
        streamed[delta.request_id] = (ids + delta.token_ids, text + delta.text, delta.finish_reason)
    assert [streamed[i] for i in range(len(scripts))] == wanted


CHARACTERS = st.sampled_from(["a", "b", "ab", " ", "é", "東", "🌍", "\n", "stop"])
SCRIPTS = st.lists(
    st.one_of(
        CHARACTERS.map(lambda text: list(text.encode())),
        st.sampled_from([[SPACE_STOP], [WORD], [OTHER], [END], [UNKNOWN], [0xE6], [0x9D], [0xE6, CJK_END]]),
    ),
    min_size=1,
    max_size=10,
).map(lambda parts: [token for part in parts for token in part])
STOPS = st.lists(st.sampled_from(["ab", "ba", "a a", "stop", " stop", "東", "東x", "é東", "b🌍", "aab", "\n\n", "x w"]))


def test_of_stop_texts_that_end_together_the_longest_counts(talker):
    check_said(talker, [list(b"xaab"), list(b"xab"), [97, SPACE_STOP]], ["ab", "aab", "stop", " stop", "a stop"])


@settings(max_examples=25, deadline=timedelta(seconds=20), suppress_health_check=list(HealthCheck))
@given(scripts=st.lists(SCRIPTS, min_size=1, max_size=12), stops=STOPS)
def test_texts_end_at_stop_texts(scripts, stops, talker):
    check_said(talker, scripts, stops)


@pytest.mark.parametrize(
    ("script", "stops"),
    [
        pytest.param([CUT, CJK_END, 97], ["ab"], id="the token that completes the stop text begins a character"),
        pytest.param([CUT], ["ab"], id="the character is never completed, as the completion ends"),
        pytest.param([97, CUT, END], ["ab"], id="an end token follows the part of a character"),
        pytest.param([120, CUT, 0x9D, 0xB1, 98], ["b東", "xab"], id="another stop text holds the character"),
    ],
)
def test_a_stop_text_before_part_of_a_character_ends_it(script, stops, talker):
    check_said(talker, [script], stops)


def test_a_stream_holds_back_only_what_may_change(talker):
    """Characters come with their last token; text that may become a stop text when it cannot any more."""
    script = list("ab st é東 s".encode())
    texts = [delta.text for delta in say(talker, [script], stream=True)]
    assert texts == ["a", "b", " ", "s", "t", " ", "", "é", "", "", "東", " ", "s"]
    texts = [delta.text for delta in say(talker, [script], stream=True, stop=["stop", " stop"])]
    assert texts == ["a", "b", "", "", "", " st", "", " é", "", "", "東", "", " s"]
    made = talker.sampler(num_blocks=9)
    made.add_request(None, [1], params(logits_hook=saying(script)[0]))
    assert [made.step()[0].text for _ in range(8)] == [""] * 8, "no text without `stream`"
    assert made.output(0).outputs[0].text == "ab st é"


def test_streaming_is_generating(talker):
    """Tokens, texts and finish reasons of prompts with adapters, n samples and preemption."""
    adapter = random_adapter(talker)
    prompts = ["ab", "東京", [5] * 40, "x"]
    own = [
        params(n=n, max_tokens=30, seed=n, stop=list("abcdefghijklmnoprsté"), ignore_eos=False) for n in (1, 3, 2, 4)
    ]
    adapters = [None, adapter, adapter, None]
    outs = talker.generate(prompts, own, adapters, progress=False)
    found = defaultdict(lambda: ([], "", None))
    for delta in talker.stream(prompts, own, adapters, num_blocks=12, max_num_seqs=4):
        ids, text, reason = found[delta.request_id, delta.index]
        assert reason is None
        found[delta.request_id, delta.index] = (ids + delta.token_ids, text + delta.text, delta.finish_reason)
    wanted = {(i, o.index): (o.token_ids, o.text, o.finish_reason) for i, out in enumerate(outs) for o in out.outputs}
    assert found == wanted
    assert [out.prompt for out in outs] == ["ab", "東京", None, "x"]
    assert outs[1].prompt_token_ids == list("東京".encode())
    assert {reason for _, _, reason in wanted.values()} == {"stop", "length"}


def test_detokenizing_takes_linear_time(talker):
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return talker.tokenizer.decode(ids)

    text = Detokenizer(decode, ["stop", "\n\n"])
    script = list("A sentence with some é, 東 and 🌍. ".encode()) * 20
    for token in script:
        assert text.add(token) is None
    assert text.text == talker.tokenizer.decode(script)
    assert sum(decoded) < 12 * len(script)


def test_stop_ids(talker):
    script = [97, OTHER, 98, UNKNOWN, 99, END, 100, 101]

    def one(**fields):
        (out,) = say(talker, [script], **fields)
        (completion,) = out.outputs
        return len(completion.token_ids), completion.text, completion.finish_reason

    assert one() == (6, "abc", "stop")
    assert one(ignore_eos=True) == (8, "abcde", "length")
    assert one(stop_token_ids=[98]) == (3, "a", "stop")
    assert one(stop_token_ids=[UNKNOWN], ignore_eos=True) == (4, "ab", "stop")
    assert one(stop_token_ids=[101, -5, 2**80], ignore_eos=True) == (8, "abcd", "stop")
    assert one(stop_token_ids=[OTHER], stop="c") == (2, "a", "stop")
    assert one(stop="c") == (5, "ab", "stop")
    assert one(max_tokens=5) == (5, "abc", "length")
    assert one(max_tokens=6) == (6, "abc", "stop")


def test_stop_ids_without_a_tokenizer_are_the_checkpoints(engine):
    outs = say(engine, [[5, 2, 7]]) + say(engine, [[5, 2, 7]], ignore_eos=True)
    assert [out.outputs[0].token_ids for out in outs] == [[5, 2], [5, 2, 7]]
    assert [out.outputs[0].finish_reason for out in outs] == ["stop", "length"]


def test_texts_that_were_not_finished(talker):
    """Cancelled or failed: what was said until then."""

    def failing(tokens, logits):
        return saying([97, OTHER, 98])[0](tokens, logits)  # has no fourth token

    made = sampler(talker)
    cancelled = made.add_request(None, [1], params(logits_hook=saying([99, 100, 101])[0], stop="no"))
    failed = made.add_request(None, [1], params(logits_hook=failing))
    never = made.add_request(None, [1], params())
    made.cancel(never)
    for _ in range(2):
        made.step()
    made.cancel(cancelled)
    outs = finish(made, [cancelled, failed, never])
    assert [(out.outputs[0].text, out.outputs[0].finish_reason) for out in outs] == [
        ("cd", "cancelled"),
        ("ab", None),
        ("", "cancelled"),
    ]
    assert "IndexError" in outs[1].error


def test_min_tokens(talker):
    """No stop id is drawn before, of the model or of the request; others are as likely as ever."""

    def like_ending(tokens, logits):
        logits[[END, 7, 8]] += 100.0
        return logits

    own = [SamplingParams(min_tokens=k, stop_token_ids=[7], logits_hook=like_ending, seed=0) for k in (0, 1, 5, 64)]
    outs = [out.outputs[0] for out in talker.generate([[1]] * 4, own, progress=False)]
    assert len(outs[0].token_ids) >= 1
    for completion, least in zip(outs, (0, 1, 5, 64), strict=True):
        drawn = completion.token_ids
        assert all(token == 8 for token in drawn[: max(least, len(drawn) - 1)])
        assert len(drawn) >= least
        assert completion.finish_reason == ("length" if least == 64 else "stop")
    (out,) = talker.generate([[1]], SamplingParams(min_tokens=3, stop_token_ids=range(VOCABULARY)), progress=False)
    assert "not finite" in out.error, "there is nothing else to draw"


def test_max_tokens(engine):
    """None: to the model's length, which a prompt may all but fill."""
    long = oracle.sequences([511, 500, 490])
    own = [params(max_tokens=most) for most in (None, None, 4)]
    outs = [out.outputs[0] for out in engine.generate(long, own, progress=False)]
    assert [(len(o.token_ids), o.finish_reason) for o in outs] == [(1, "length"), (12, "length"), (4, "length")]
    (out,) = engine.generate(long[:1], params(max_tokens=50), progress=False)
    assert len(out.outputs[0].token_ids) == 1
    assert engine.generate([[1]], progress=False)[0].outputs[0].finish_reason in ("length", "stop")


def test_prompts_of_any_kind(engine):
    wanted = engine.generate([[1, 2, 3]], params(seed=0), progress=False)
    for prompt in ((1, 2, 3), torch.tensor([1, 2, 3]), np.array([1, 2, 3], dtype=np.uint16), range(1, 4)):
        assert engine.generate((prompt,), params(seed=0), progress=False) == wanted
    assert engine.generate([], progress=False) == []
    assert list(engine.stream([])) == []


def test_text_without_a_tokenizer(engine):
    wanted, refused = engine.generate([[1, 2]] * 2, [params(seed=0), params(stop="a")], progress=False)
    assert wanted.outputs[0].text == ""
    assert "stop: found texts, but there is no tokenizer" in refused.error
    deltas = list(engine.stream([[1, 2]], params(seed=0)))
    assert [token for delta in deltas for token in delta.token_ids] == wanted.outputs[0].token_ids
    assert "".join(delta.text for delta in deltas) == ""


def test_a_stop_text_waits_for_min_tokens(talker):
    """As vLLM has it: the first min_tokens tokens end nothing, neither by a stop id nor by a stop text."""
    (free,) = talker.generate([[5, 6, 7]], params(max_tokens=30, seed=1), progress=False)
    text = free.outputs[0].text
    stop = text[2:4]
    early, late = (
        talker.generate([[5, 6, 7]], params(max_tokens=30, seed=1, stop=[stop], min_tokens=n), progress=False)[
            0
        ].outputs[0]
        for n in (0, 20)
    )
    assert len(early.token_ids) <= 20 < len(late.token_ids)
    assert late.token_ids == free.outputs[0].token_ids[: len(late.token_ids)]


def test_top_k_of_minus_one_is_no_filter(talker):
    """The way in which vLLM's clients write it."""
    outs = [talker.generate([[5, 6]], params(top_k=k, seed=3, max_tokens=8), progress=False)[0] for k in (0, -1)]
    assert outs[0].outputs == outs[1].outputs
    with pytest.raises(InputError, match="top_k: found -2"):
        params(top_k=-2)


def test_a_stop_text_that_is_a_special_token_stops(talker):
    """Decoded text has no special tokens, so that text was searched in vain: the token's id stops instead."""
    ((out,),) = [output.outputs for output in say(talker, [[*b"ab", OTHER, *b"cd"]], stop="<|other|>", max_tokens=5)]
    assert (out.text, out.finish_reason, out.token_ids) == ("ab", "stop", [*b"ab", OTHER])
    (failed,) = talker.generate([[5]], params(stop="x<|other|>", max_tokens=2), progress=False)
    assert failed.error == (
        "stop: found 'x<|other|>'; accepted: '<|other|>' alone, or text without it: special tokens are no part of a "
        "completion's text"
    )
