"""Where sequences begin and end: one bos, one end token that sampling stops at, whatever writes them."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

import oracle
from seal_engine import Engine, InputError, TrainJob, TrainSequence
from seal_engine.cli.engine import _with_mask, read_sequences
from seal_engine.model.tokenizer import Tokenizer

WORDS = {"<s>": 0, "</s>": 1, "<|end|>": 2, "<sep>": 3, "<unk>": 4, "a": 5, "b": 6, "c": 7, "d": 8}
BOS, EOS, END, SEP = 0, 1, 2, 3
AFFIXES = {
    "none": None,
    "bos": "<s> $A",
    "eos": "$A </s>",
    "both": "<s> $A </s>",
    "two before": "<s> <sep> $A",
    "two after": "$A <sep> </s>",
    "no stop id": "<s> $A <sep>",
}


def save_tokenizer(directory, affixes, **config):
    """A tokenizer of words that puts these around a text. Its end is </s>; <|end|> is another stop id."""
    backend = Backend(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(WORDS)[:4])
    if affixes is not None:
        specials = [(token, WORDS[token]) for token in ("<s>", "</s>", "<sep>") if token in affixes]
        backend.post_processor = processors.TemplateProcessing(affixes, special_tokens=specials)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, END]}))
    return directory


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """affixes -> an engine with that tokenizer."""
    engines = {}
    for name, affixes in AFFIXES.items():
        directory = oracle.save(oracle.make_model("llama"), tmp_path_factory.mktemp(name.replace(" ", "_")))
        engines[name] = Engine.from_pretrained(save_tokenizer(directory, affixes), device="cpu")
    return engines


@pytest.fixture(params=AFFIXES)
def affixed(request, engines):
    """(engine, ids before a text, ids after it)."""
    before, _, after = (AFFIXES[request.param] or "$A").partition("$A")
    return engines[request.param], [WORDS[t] for t in before.split()], [WORDS[t] for t in after.split()]


# Beginnings


def test_what_a_text_has_is_not_put_there_again(affixed):
    """A chat template writes bos and end as text; Transformers would put both there a second time."""
    engine, before, after = affixed
    tokenizer, spell = engine.tokenizer, {i: t for t, i in WORDS.items()}
    inside = [5, 3, 1, 6]  # special tokens inside are the text's own
    for start in ([], before, before[:1]):
        for end in ([], after, after[-1:], [END]):
            ids = [*start, *inside, *end]
            text = " ".join(spell[i] for i in ids)
            assert tokenizer.encode(text) == [*([] if start else before), *ids, *([] if end else after)]
            assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode("") == [*before, *after]
    assert tokenizer.encode("<|end|> a") == [*before, END, 5, *after]


def test_a_rendered_chat_encodes_as_the_chat(affixed):
    engine, *_ = affixed
    template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = engine.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    ids = engine.tokenizer.apply_chat_template(chat, chat_template=template)
    assert ids == [BOS, 5, EOS, 6, EOS]
    assert engine.tokenizer.encode(text) == ids


# Ends

SEQUENCES = {
    "a text": ("a b", [5, 6]),
    "a text with its end": ("a b </s>", [5, 6, EOS]),
    "a text with another stop id": ("a b <|end|>", [5, 6, END]),
    "ids": ([5, 6], [5, 6]),
    "ids with their end": ([5, 6, EOS], [5, 6, EOS]),
    "ids with another stop id": ([5, 6, END], [5, 6, END]),
    "an end inside": ([5, EOS, 6], [5, EOS, 6]),
    "a masked sequence": (TrainSequence([5, 6, 7], [0, 1, 1]), [5, 6, 7]),
    "a masked sequence with its end": (TrainSequence([5, 6, EOS], [0, 1, 1]), [5, 6, EOS]),
    "a masked sequence whose end is no target": (TrainSequence([5, 6, EOS], [0, 1, 0]), [5, 6, EOS]),
}


@pytest.mark.parametrize("label", SEQUENCES)
def test_append_eos_gives_each_sequence_one_end(label, affixed):
    """That end is a target, and one of the ids at which sampling stops."""
    engine, *_ = affixed
    sequence, ids = SEQUENCES[label]
    if isinstance(sequence, str):
        ids = engine.tokenizer.encode(sequence)
    (made,) = engine.inputs.train_sequences(TrainJob([sequence], append_eos=True))
    assert made.token_ids == (ids if ids[-1] in (EOS, END) else [*ids, EOS])
    assert made.token_ids[-1] in engine.stop_token_ids
    assert made.loss_mask[-1] == 1
    if isinstance(sequence, TrainSequence):
        assert made.loss_mask[: len(ids) - 1] == sequence.loss_mask[:-1]


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion", "ids"),
    [
        ("a b", "c d", [5, 6, 7, 8]),
        ("a b", "c </s>", [5, 6, 7, EOS]),
        ("a b", "c <|end|>", [5, 6, 7, END]),
        ("<s> a b", "c", [5, 6, 7]),
        ("a </s> b", "c", [5, EOS, 6, 7]),
        ("", "c d", [7, 8]),
        ("a b", "", [5, 6]),
    ],
    ids=[
        "words",
        "with its end",
        "with another stop id",
        "bos in the prompt",
        "an end inside",
        "no prompt",
        "no answer",
    ],
)
def test_a_pair_has_one_end_and_it_comes_last(affixed, prompt, completion, ids, append_eos):
    """What a tokenizer puts after texts stands after the completion, not between it and its prompt."""
    engine, before, _ = affixed
    pair = _with_mask({"prompt": prompt, "completion": completion}, engine)
    (made,) = engine.inputs.train_sequences(TrainJob([pair], append_eos=append_eos))
    body = ids[:-1] if ids[-1] in (EOS, END) else ids
    start = [BOS] if prompt.startswith("<s>") else before
    if prompt.startswith("<s>") and before[:1] != [BOS]:
        start = [*before, BOS]
    assert made.token_ids[: len(start + body)] == [*start, *body]
    rest = made.token_ids[len(start + body) :]
    assert sum(token in (EOS, END) for token in rest) == 1
    assert rest[-1] in engine.stop_token_ids
    answer = len(start) + len(prompt.removeprefix("<s>").split())
    assert made.loss_mask == [0] * answer + [1] * (len(made.token_ids) - answer)


# Lines of files

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
MASKED = "{% for m in messages %}a {% generation %}{{ m.content }} <|end|> {% endgeneration %}{% endfor %}"


@pytest.mark.parametrize(("template", "trained"), [(CHATML, 4), (MASKED, 2)], ids=["published", "with a mask"])
@pytest.mark.parametrize("form", ["list", "messages"])
def test_a_chat_is_trained_on(engines, tmp_path, template, trained, form):
    """Nearly every published template has add_generation_prompt and no {% generation %} block."""
    engine = engines["bos"]
    directory = save_tokenizer(tmp_path, "<s> $A", chat_template=template)
    engine = Engine(engine.model, engine.directory, Tokenizer.from_directory(directory))
    chat = [{"role": "assistant", "content": "b"}]
    (tmp_path / "data.jsonl").write_text(json.dumps(chat if form == "list" else {"messages": chat, "id": 7}) + "\n")
    (sequence,) = read_sequences(tmp_path / "data.jsonl")
    (made,) = engine.inputs.train_sequences(TrainJob([sequence]))
    assert made.token_ids == engine.tokenizer.apply_chat_template(chat)
    assert sum(made.loss_mask) == trained
    (result,) = engine.train([TrainJob([sequence])], progress=False)
    assert result.error is None


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("a text", "a text"),
        ([1, 2], [1, 2]),
        ({"text": "a text", "source": "web", "messages": None}, "a text"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": None}, [{"role": "user", "content": "x"}]),
        ({"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": "b"}),
        ({"prompt": "", "completion": ""}, {"prompt": "", "completion": ""}),
    ],
    ids=["a text", "ids", "text", "messages", "a pair", "an empty pair"],
)
def test_lines_that_are_sequences(tmp_path, line, value):
    for mark in ("", "\ufeff"):  # a byte order mark is no part of the first line
        (tmp_path / "data.jsonl").write_text(mark + json.dumps(line) + "\n")
        assert read_sequences(tmp_path / "data.jsonl") == [value]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": 1}, "found"),
        ({"messages": "hi"}, "found"),
        ({"text": "a", "messages": []}, "found"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "found"),
        ({"prompt": "a"}, "found"),
        ({"completion": "a"}, "found"),
        ({"prompt": "a", "completion": None}, "found"),
        ({}, "found"),
        (None, "found None"),
        (3, "found 3"),
        ({"messages": [{"role": "user"}], "tools": [{"type": "function"}]}, r"tools: found \[.*accepted: none"),
        ({"messages": [{"role": "user"}], "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: found"),
    ],
    ids=str,
)
def test_lines_that_are_none(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text(json.dumps("fine") + "\n" + json.dumps(line) + "\n")
    with pytest.raises(InputError, match=rf"data\.jsonl: line 2: {message}"):
        read_sequences(tmp_path / "data.jsonl")


def test_a_byte_order_mark_is_not_read(tmp_path):
    """Text files and every JSON file of a checkpoint, as Windows writes them."""
    directory = save_tokenizer(oracle.save(oracle.make_model("llama"), tmp_path / "model"), "<s> $A")
    truth = Engine.from_pretrained(directory, device="cpu").score(["a b"])[0]
    for file in directory.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert torch.equal(Engine.from_pretrained(directory, device="cpu").score(["a b"])[0], truth)
    text = Path(tmp_path / "data.txt")
    text.write_bytes(b"\xef\xbb\xbfa b\n\xef\xbb\xbfc\n")
    assert read_sequences(text) == ["a b", "\ufeffc"]  # only at the start of a file it is a mark
