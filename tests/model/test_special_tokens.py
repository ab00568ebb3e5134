"""Special tokens wherever a model directory may name them: ids, names and what decoding skips are Transformers'."""

import itertools
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from seal_engine.model.tokenizer import Tokenizer
from seal_engine.types import InputError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ("<|a|>", "<|b|>", "<|c|>", "<|d|>")
NAMES = ("eos_token", "pad_token", "turn_token", "think_token")
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def save(directory, added=(), **files):
    """A byte-level tokenizer.json with these added tokens, and JSON files beside it."""
    backend = Backend(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    backend.save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config": {}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def same(directory) -> Tokenizer:
    """Our tokenizer, after it did as Transformers' does."""
    ours, theirs = Tokenizer.from_directory(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    text = "x" + "y".join(itertools.chain(TOKENS, TOKENS[::-1]))
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    template = "".join(f"[{{{{ {name} }}}}]" for name in NAMES) + "{{ messages[0].content }}"
    chat, arguments = [{"role": "user", "content": "hi"}], {"chat_template": template, "tokenize": False}
    assert ours.apply_chat_template(chat, **arguments) == theirs.apply_chat_template(chat, **arguments)
    return ours


token = st.sampled_from(TOKENS)
written = token | token.map(lambda content: {"content": content, "__type": "AddedToken", **FLAGS})
named = st.dictionaries(st.sampled_from(NAMES), written, max_size=3)
extra = (
    st.none()
    | st.lists(token, unique=True, max_size=2)
    | st.dictionaries(st.sampled_from(NAMES[2:]), token, max_size=2)
)
numbers = st.permutations(TOKENS).flatmap(lambda order: st.integers(0, 4).map(lambda n: order[:n]))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_wherever_tokens_are_named(data):
    added = [AddedToken(t, special=data.draw(st.booleans()), normalized=False) for t in data.draw(numbers)]
    first = len(ALPHABET) + len(added)
    config = data.draw(named)
    for name in ("extra_special_tokens", "additional_special_tokens"):
        config |= {name: value} if (value := data.draw(extra if name[0] == "e" else st.none())) is not None else {}
    files = {"tokenizer_config": config}
    new = [t for t in data.draw(numbers) if t not in {a.content for a in added}]
    kind = data.draw(st.sampled_from(["neither", "decoder", "older", "older, with a map"]))
    if kind == "decoder":
        known = {len(ALPHABET) + i: {"content": a.content, "special": a.special, **FLAGS} for i, a in enumerate(added)}
        listed = {first + i: {"content": t, "special": data.draw(st.booleans()), **FLAGS} for i, t in enumerate(new)}
        config["added_tokens_decoder"] = {str(i): value for i, value in (known | listed).items()}
    elif kind != "neither":
        files["added_tokens"] = {t: first + i for i, t in reversed(list(enumerate(new)))}
        if kind == "older, with a map":
            files["special_tokens_map"] = data.draw(st.dictionaries(st.sampled_from(NAMES), token, max_size=3))
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory), added, **files)
        same(Path(directory))


def test_added_tokens_json_gives_ids_and_the_end(tmp_path):
    """The end that special_tokens_map.json names is the token of added_tokens.json, not a new one."""
    first = len(ALPHABET)
    save(tmp_path, special_tokens_map={"eos_token": "<|b|>"}, added_tokens={"<|b|>": first + 1, "<|a|>": first})
    tokenizer = same(tmp_path)
    assert tokenizer.encode("<|a|>x<|b|>")[::2] == [first, first + 1]
    assert tokenizer.stop_token_ids == (first + 1,)
    assert tokenizer.decode([first, first + 1], skip_special_tokens=True) == "<|a|>"  # nothing says that it is special


def test_added_tokens_json_gives_way_to_a_decoder(tmp_path):
    decoder = {str(len(ALPHABET)): {"content": "<|a|>", "special": True, **FLAGS}}
    save(tmp_path, tokenizer_config={"added_tokens_decoder": decoder}, added_tokens={"<|b|>": len(ALPHABET)})
    assert same(tmp_path).decode([len(ALPHABET)]) == "<|a|>"


@pytest.mark.parametrize("content", [{"<|a|>": "1"}, {"<|a|>": True}, {"<|a|>": -1}, {"<|a|>": None}])
def test_a_broken_added_tokens_json(tmp_path, content):
    save(tmp_path, added_tokens=content)
    with pytest.raises(
        InputError, match=r"added_tokens\.json: found dict .*accepted: an object of tokens and their ids"
    ):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("prepend", [True, False])
def test_skipping_goes_by_id(tmp_path, normalized, prepend):
    """The library asks whether a token's text is special, which its normalizer changed; Llama's own class skips it."""
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "▁", "h", "i", "▁h", "▁hi"])}
    backend = Backend(models.BPE(vocabulary, [("▁", "h"), ("▁h", "i")], unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prepend else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=normalized) for t in list(vocabulary)[:3]])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).decode([1, 7, 2], skip_special_tokens=True) == "hi"
    assert tokenizer.decode([1, 7, 2], skip_special_tokens=True) == "hi"
    assert tokenizer.pieces(3) == [("", "")] * 3
