"""Sampling under the grammar: every sample is a directive, every directive can be sampled, with any tokenizer."""

import json
import random
import re
import time
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from seal_engine import Engine, SamplingParams
from seal_engine.domains.few_shot.directive import STRATEGIES, Directive, parse
from seal_engine.domains.few_shot.directive_grammar import NODES, DirectiveGrammar
from seal_engine.domains.few_shot.task import FewShot, FewShotConfig
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.tiny import MODEL
from seal_engine.tiny.puzzles import PUZZLE_MODEL, Puzzles, text_form
from seal_engine.types import InputError

LETTERS = sorted({character for node in NODES for character in node})
DIRECTIVES = st.builds(
    Directive, *[st.booleans()] * 4, st.sampled_from(STRATEGIES), st.floats(1e-99, 1), st.integers(1, 375)
)
TEXT = Directive(True, False, True, False, STRATEGIES[1], 1e-4, 2).to_json()
SELF_EDITS = [TEXT.replace("0.0001", rate) for rate in ("1e-4", "1e-04", "0.00010", "1.0e-4", "9.99e-01", "1", "1.000")]


@st.composite
def vocabularies(draw):
    """Texts of tokens: all letters, pieces of directives, and anything else; the same text may be there twice."""
    pieces = [text[i : i + n] for text, i, n in draw(st.lists(st.tuples(CUT, st.integers(0, 250), st.integers(1, 30))))]
    words = [*LETTERS, *pieces, *draw(st.lists(st.text(max_size=5)))]
    return draw(st.permutations(words))


CUT = st.one_of(DIRECTIVES.map(Directive.to_json), st.sampled_from(SELF_EDITS))


def grammar(words, max_tokens=400):
    """The hook for tokens with these texts; the end token is the last one."""
    return DirectiveGrammar([*((word, word) for word in words), ("", "")], [len(words)], max_tokens)


def allowed(hook, tokens, size):
    return set(hook(tokens, torch.zeros(size)).isfinite().nonzero().flatten().tolist())


def sample(hook, size, generator):
    """Tokens of a completion under random logits; the last is the end token."""
    tokens = []
    while not tokens or tokens[-1] != size - 1:
        tokens.append(int(hook(tokens, torch.randn(size, generator=generator)).argmax()))
    return tokens


@settings(deadline=None)
@given(words=vocabularies(), seed=st.integers(0, 2**32), room=st.integers(0, 60))
def test_every_sample_is_a_directive(words, seed, room):
    """With room for the shortest directive and its end, and for `room` tokens more."""
    with pytest.raises(InputError) as caught:
        grammar(words, 1)
    bound = int(re.search(r"max_tokens: found 1; accepted: at least (\d+)", str(caught.value))[1]) + room
    tokens = sample(grammar(words, bound), len(words) + 1, torch.Generator().manual_seed(seed))
    assert len(tokens) <= bound
    text = "".join(words[token] for token in tokens[:-1])
    directive = parse(text)
    rate = re.search(r'learning_rate": (.*?),', text)[1]
    assert text == directive.to_json().replace(json.dumps(directive.learning_rate), rate)


@settings(deadline=None)
@given(text=CUT, words=vocabularies(), seed=st.integers(0, 2**32))
def test_every_directive_can_be_sampled(text, words, seed):
    """However it is cut into tokens."""
    draw, hook, at, tokens = random.Random(seed), grammar(words), 0, []
    while at < len(text):
        token = draw.choice([i for i, word in enumerate(words) if word and text.startswith(word, at)])
        assert token in allowed(hook, tokens, len(words) + 1)
        tokens.append(token)
        at += len(words[token])
    assert allowed(hook, tokens, len(words) + 1) == {len(words)}


def sentence_pieces():
    """As Llama 2's: words begin with a mark, what is not in the vocabulary is written as bytes."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, show_progress=False)
    backend.train_from_iterator([TEXT.replace("{", ""), *SELF_EDITS[:2]] * 2, trainer)
    spelt = json.loads(backend.to_str())
    for i in range(256):
        spelt["model"]["vocab"][f"<0x{i:02X}>"] = len(spelt["model"]["vocab"])
    backend = tokenizers.Tokenizer.from_str(json.dumps(spelt))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return Tokenizer(backend, {}, [2])


TOKENIZERS = {
    "byte-level": lambda: Tokenizer.from_directory(MODEL),
    "byte-level, for directives": lambda: Tokenizer.from_directory(PUZZLE_MODEL),
    "sentence pieces": sentence_pieces,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name):
    """Directives as the tokenizer cuts them, and as samples cut them."""
    tokenizer = TOKENIZERS[name]()
    size = tokenizer.vocab_size + 7  # models may have more rows than there are tokens
    (end,) = tokenizer.stop_token_ids
    hook, draw = DirectiveGrammar(tokenizer.pieces(size), [end], 300), random.Random(0)
    for _ in range(20):
        flags = [draw.random() < 0.5 for _ in range(4)]
        text = Directive(*flags, draw.choice(STRATEGIES), draw.random() ** 9, draw.randint(1, 375)).to_json()
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(token in allowed(hook, ids[:i], size) for i, token in enumerate([*ids, end]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens = []
        while end not in tokens:
            tokens.append(int(hook(tokens, torch.randn(size, generator=generator)).argmax()))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert text.startswith('{"data')
        parse(text)


def test_a_token_that_ends_completions_is_no_text():
    words = [*LETTERS, "},", "}}"]
    hook = DirectiveGrammar([(word, word) for word in words], [words.index("}")], 400)
    ids = [words.index(word) for word in re.findall("},|.", TEXT[:-2])]
    assert allowed(hook, ids, len(words)) == {words.index(character) for character in (*"0123456789", "}}")}
    assert allowed(hook, [*ids, words.index("}}")], len(words)) == {words.index("}")}


def test_a_space_before_is_taken_where_there_is_no_other_way():
    words = [*(character for character in LETTERS if character != "{"), " {"]
    assert allowed(grammar([*words, "{"]), [], len(words) + 2) == {len(words)}
    tokens = sample(grammar(words), len(words) + 1, torch.Generator().manual_seed(0))
    text = "".join(words[token] for token in tokens[:-1])
    assert text.startswith(" {")
    parse(text)


@pytest.mark.parametrize(
    ("words", "stops", "max_tokens", "message"),
    [
        (LETTERS, [], 400, "grammar: found a model without stop ids"),
        (LETTERS, [99], 400, "grammar: found a model without stop ids"),
        (LETTERS[1:], [0], 400, "grammar: found a vocabulary that cannot spell a directive"),
        ([], [0], 400, "grammar: found a vocabulary that cannot spell a directive"),
        (LETTERS, [0], 128, "max_tokens: found 128; accepted: at least 249"),
    ],
)
def test_mistakes(words, stops, max_tokens, message):
    with pytest.raises(InputError, match=message):
        DirectiveGrammar([("", ""), *((word, word) for word in words)], stops, max_tokens)


def test_a_large_vocabulary():
    draw, words = random.Random(0), [*LETTERS, *(f"{i:0{n}}" for n in (2, 3) for i in range(10**n))]
    words += [TEXT[i : i + n] for n in range(2, 20) for i in range(len(TEXT) - n)]
    letters = [*map(chr, range(97, 123)), " ", "_"]
    words += ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(128_000 - len(words))]
    start = time.process_time()
    hook = grammar(words, 128)
    assert time.process_time() - start < 2
    logits, start = torch.zeros(len(words) + 1), time.process_time()
    for _ in range(100):
        hook([], logits)
    assert time.process_time() - start < 0.1


def test_the_shipped_model():
    """Off, nothing constrains; on, every sample is a directive, however hot."""
    engine = Engine.from_pretrained(PUZZLE_MODEL, device="cpu", dtype="float32")
    tasks = Puzzles().puzzles("train", 4)
    free, bound = (FewShot(FewShotConfig(grammar=on), engine, tasks, []) for on in (False, True))
    assert free.logits_hook(128) is None
    hook = bound.logits_hook(128)
    assert hook is bound.logits_hook(128) is not None
    prompts = [text_form().ask_self_edit(task, engine.tokenizer) for task in tasks]
    for temperature in (0.8, 3.0, 30.0):
        params = SamplingParams(temperature=temperature, max_tokens=128, n=8, seed=0, logits_hook=hook)
        for out in engine.generate(prompts, params, progress=False):
            assert out.error is None
            for one in out.outputs:
                assert one.finish_reason == "stop"
                parse(one.text)
    unending = SimpleNamespace(tokenizer=engine.tokenizer, config=engine.config, stop_token_ids=())
    with pytest.raises(InputError, match="without stop ids"):
        FewShot(FewShotConfig(grammar=True), unending, tasks, []).logits_hook(128)
