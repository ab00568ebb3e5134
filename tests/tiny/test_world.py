"""The miniature world, what the tiny model is pretrained on, and the shipped checkpoint."""

import random
from itertools import islice, pairwise

import pytest

from seal_engine import Engine, SamplingParams
from seal_engine.tiny import MODEL
from seal_engine.tiny.pretrain import Recipe, documents, train_tiny
from seal_engine.tiny.world import (
    FACTS,
    FIRST,
    LAST,
    QUESTION_PROMPT,
    READING_PROMPT,
    SELF_EDIT_PROMPT,
    STYLES,
    VALUES,
    World,
    write,
)

WORLD = World()
PASSAGES = WORLD.passages("heldout", 20, seed=1)


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(MODEL, device="cpu", dtype="float32")


def stated(passage):
    """The answers to a passage's questions."""
    return {question.answer for question in passage.questions}


def answered(lines):
    """The last words of lines, which is where answers stand."""
    return [line.rstrip(".").split()[-1] for line in lines]


def test_the_same_seed_makes_the_same_world():
    again = World()
    assert (again.train, again.heldout, again.told) == (WORLD.train, WORLD.heldout, WORLD.told)
    assert again.passages("heldout", 20, seed=1) == PASSAGES != again.passages("heldout", 20, seed=2)
    assert World(1).heldout != WORLD.heldout
    assert WORLD.heldout[:2] == ["Kesa Walham", "Bania Dunwick"], "splits must not depend on the platform"


def test_splits_are_disjoint():
    kept = {passage.title for passage in (*WORLD.told, *WORLD.described)}
    train, heldout = set(WORLD.train), set(WORLD.heldout)
    assert not train & heldout
    assert not kept & (train | heldout)
    assert len(kept | train | heldout) == 64 * 64
    with pytest.raises(KeyError):
        WORLD.passages("test", 1, seed=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pretraining_never_mentions_heldout_people(stage):
    found = [d.passage + d.body for d in islice(documents(WORLD, random.Random(0), stage, Recipe()), 3000)]
    assert found == [d.passage + d.body for d in islice(documents(WORLD, random.Random(0), stage, Recipe()), 3000)]
    heldout = set(WORLD.heldout)
    for text in found:
        words = text.replace(".", "").replace("?", "").split()
        assert not heldout & {f"{first} {last}" for first, last in pairwise(words)}


def test_answers_stand_in_the_passage_before_the_name():
    for passage in PASSAGES:
        words = passage.context.replace(".", "").split()
        assert len(passage.questions) == len(stated(passage)) == FACTS
        for question in passage.questions:
            assert passage.title in question.question
            assert words.count(question.answer) == 1
            assert passage.context.index(question.answer) < passage.context.index(passage.title)


@pytest.mark.parametrize("style", STYLES)
def test_styles(style):
    for passage in PASSAGES:
        text = write(style, passage, random.Random(3))
        assert text == write(style, passage, random.Random(3)) != write(style, passage, random.Random(4))
        lines = text.split("\n")
        assert len(lines) == (2 if style.startswith("few") else FACTS)
        assert all((passage.title in line) == (style != "paraphrase") for line in lines)
        assert all(("?" in line) == style.endswith("questions") for line in lines)
        answers = answered(lines)
        if style.startswith("wrong"):
            assert not stated(passage) & set(answers)
        elif style.endswith(("questions", "statements")):
            assert set(answers) <= stated(passage)
            assert len(set(answers)) == len(lines)
        elif style == "vague":
            assert not any(answer in text for answer in stated(passage))
        else:
            assert all(any(answer in line for answer in stated(passage)) for line in lines)
        asked = {QUESTION_PROMPT.format(question=question.question) for question in passage.questions}
        assert not any(question in text for question in asked), "notes never use the phrasing that is asked"


def test_unknown_style():
    with pytest.raises(ValueError, match="accepted: one of"):
        write("poem", PASSAGES[0], random.Random(0))


def test_tokenizer(engine):
    for text in ("naïve 東京 \U0001f99c\n\ttabs  and   spaces", "def f(x):\n    return x**2", "\x00\x7f"):
        assert engine.tokenizer.decode(engine.tokenizer.encode(text)) == text
    assert all(len(engine.tokenizer.encode(f" {word}")) == 1 for word in (*FIRST, *LAST, *VALUES))
    for passage in PASSAGES:
        assert len(engine.tokenizer.encode(SELF_EDIT_PROMPT.format(title="", context=passage.context))) <= 90


def test_the_checkpoint_reads_passages_and_knows_nothing_without(engine):
    params = SamplingParams(temperature=0, max_tokens=8, stop="\n")
    asked = [(passage, question) for passage in PASSAGES for question in passage.questions]
    values = [{"title": passage.title, "context": passage.context, "question": q.question} for passage, q in asked]
    accuracy = []
    for template in (READING_PROMPT, QUESTION_PROMPT):
        outs = engine.generate([template.format(**value) for value in values], params, progress=False)
        right = [out.outputs[0].text.strip() == q.answer for out, (_, q) in zip(outs, asked, strict=True)]
        accuracy.append(sum(right) / len(right))
    assert accuracy[0] >= 0.9
    assert accuracy[1] <= 0.2


def test_the_recipe_writes_a_checkpoint(tmp_path):
    """A model too small and too short to learn anything, but every step of the way is taken."""
    recipe = Recipe(hidden=64, heads=2, layers=1, copy_steps=2, reading_steps=1, keeping_steps=1, rows=2)
    report = train_tiny(tmp_path / "model", recipe, progress=False)
    assert report["steps"] == 4
    assert 0 <= report["reading"] <= 1
    assert train_tiny(tmp_path / "again", recipe, progress=False) == report
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert weights[0] == weights[1]
    engine = Engine.from_pretrained(tmp_path / "model", device="cpu")
    assert len(engine.logits(["Where does Bala Ashby live?"])[0]) > 5
