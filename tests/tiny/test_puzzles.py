"""The puzzles, what the puzzle model is pretrained on, and the shipped checkpoint."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from seal_engine import Engine, SamplingParams
from seal_engine.domains.few_shot.directive import STRATEGIES, DirectiveError, parse
from seal_engine.tiny.pretrain import Recipe
from seal_engine.tiny.pretrain_puzzles import PuzzleRecipe, documents, train_puzzle_model
from seal_engine.tiny.puzzles import (
    AREAS,
    DATA,
    EPOCHS,
    LEARNING_RATES,
    NEW_KINDS,
    NO_CHANGE,
    PUZZLE_MODEL,
    Puzzles,
    Rule,
    text_form,
    write_directive,
)

PUZZLES = Puzzles()
HELDOUT = PUZZLES.puzzles("heldout", 24)
FORM = text_form()


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(PUZZLE_MODEL, device="cpu", dtype="float32")


def kind(task):
    return task.name.partition(" ")[2]


def changes(task):
    """The pairs of different colours at one place of an input and of its output."""
    return {
        pair
        for example in (*task.train, *task.tests)
        for rows in zip(example.input, example.output, strict=True)
        for pair in zip(*rows, strict=True)
        if pair[0] != pair[1]
    }


def known_pairs():
    return {(colour, target) for colour, targets in PUZZLES.targets[False].items() for target in targets}


def test_the_same_seed_makes_the_same_puzzles():
    assert Puzzles().puzzles("heldout", 24) == HELDOUT != PUZZLES.puzzles("heldout", 24, seed=1)
    assert PUZZLES.puzzles("train", 24) != HELDOUT
    assert Puzzles(1).known != PUZZLES.known == Puzzles().known
    assert Counter(kind(task) for task in HELDOUT) == dict.fromkeys(NEW_KINDS, 12)
    with pytest.raises(ValueError, match="accepted: train, heldout"):
        PUZZLES.puzzles("test", 1)


def test_rules():
    grid, colours = ((1, 2, 3), (4, 5, 6), (7, 8, 9)), (0, 0, *NO_CHANGE[2:])
    swap = (*NO_CHANGE[1:], 0)
    outputs = {area: Rule(None, area, swap).apply(grid) for area in AREAS}
    assert outputs == {
        "all": ((2, 3, 4), (5, 6, 7), (8, 9, 0)),
        "top": ((2, 3, 4), (4, 5, 6), (7, 8, 9)),
        "bottom": ((1, 2, 3), (4, 5, 6), (8, 9, 0)),
        "left": ((2, 2, 3), (5, 5, 6), (8, 8, 9)),
        "right": ((1, 2, 4), (4, 5, 7), (7, 8, 0)),
        "rim": ((2, 3, 4), (5, 5, 7), (8, 9, 0)),
        "inside": ((1, 2, 3), (4, 6, 6), (7, 8, 9)),
    }
    assert Rule(None, "all", colours).shown(grid) == set(range(10)) - {1}


def test_puzzles_show_what_becomes_of_every_colour():
    for task in HELDOUT:
        shown = {colour for example in task.train for row in example.output for colour in row}
        assert len(task.train) == 3
        if kind(task) == "upside down":
            assert {colour for test in task.tests for row in test.output for colour in row} <= shown


def test_each_kind_is_what_it_is_named_for():
    """Turned copies of demonstrations show colours where tests have them, or they break the rule."""
    for task in HELDOUT:
        tops = [{colour for one in examples for colour in one.input[0]} for examples in (task.train, task.tests)]
        bottoms = [{colour for one in examples for colour in one.input[-1]} for examples in (task.train, task.tests)]
        if kind(task) == "upside down":
            assert not tops[0] & tops[1]
            assert not bottoms[0] & bottoms[1]
            assert tops[0] & bottoms[1]
        else:
            assert all(one.input[1:] == one.output[1:] for one in (*task.train, *task.tests))
            assert all(one.input[0] != one.output[0] for one in (*task.train, *task.tests))


def test_new_rules_never_occur_in_pretraining():
    """Not a single pair of colours of theirs does, in any document that recolours."""
    known = known_pairs()
    assert len(known) == 40
    assert not any(known & changes(task) for split in ("train", "heldout") for task in PUZZLES.puzzles(split, 64))
    source = documents(PUZZLES, random.Random(0), PuzzleRecipe(directives=0.0))
    pattern = re.compile(r"(\[\[.*?\]\]) -> (\[\[.*?\]\])\n")
    grids = {example.input for task in HELDOUT for example in task.train}
    recoloured = 0
    for document in islice(source, 3000):
        pairs = [tuple(map(FORM.read_answer, pair)) for pair in pattern.findall(document.text)]
        cells = [(a, b) for x, y in pairs for a, b in zip(sum(x, ()), sum(y, ()), strict=True) if a != b]
        moved = all(sorted(sum(x, ())) == sorted(sum(y, ())) for x, y in pairs)
        recoloured += not moved
        assert moved or set(cells) <= known
        assert not grids & {x for x, _ in pairs}
    assert recoloured > 2000


def test_documents_repeat():
    for copying in (False, True):
        found = [
            [d.text for d in islice(documents(PUZZLES, random.Random(0), PuzzleRecipe(), copying), 200)] for _ in "ab"
        ]
        assert found[0] == found[1]


def test_the_menu():
    rng = random.Random(0)
    written = [write_directive(rng) for _ in range(2400)]
    assert len(set(written)) == len(DATA) * len(STRATEGIES) * len(LEARNING_RATES) * len(EPOCHS)
    assert min(Counter(written).values()) > 20
    assert all(parse(directive.to_json()) == directive for directive in written)


def test_tokenizer(engine):
    for text in ("naïve 東京 \U0001f99c\n\ttabs  and   spaces", "def f(x):\n    return x**2", "\x00\x7f", "3.5e-07 12"):
        assert engine.tokenizer.decode(engine.tokenizer.encode(text)) == text
    for task in HELDOUT:
        assert len(engine.tokenizer.encode(FORM.answer(task.tests[0].output))) == 9 + 2, "a token a cell"
        assert len(FORM.ask_self_edit(task, engine.tokenizer)) <= 70


def test_the_model_writes_directives_of_the_whole_menu(engine):
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=64, n=16, seed=0)
    outs = engine.generate([FORM.ask_self_edit(task, engine.tokenizer) for task in HELDOUT], params, progress=False)
    texts, written = [one.text for out in outs for one in out.outputs], []
    for text in texts:
        try:
            written.append(parse(text))
        except DirectiveError:
            continue
    assert len(written) >= 0.95 * len(texts)
    for found, menu in (
        ([(d.use_basic_augmentations, d.use_repeat_augmentations) for d in written], DATA),
        ([d.strategy for d in written], STRATEGIES),
        ([d.learning_rate for d in written], LEARNING_RATES),
        ([d.num_train_epochs for d in written], EPOCHS),
    ):
        counts = Counter(found)
        assert set(counts) >= set(menu)
        assert min(counts[choice] for choice in menu) >= 0.5 * len(written) / len(menu)


def test_the_checkpoint_solves_known_puzzles_and_hardly_any_new_one(engine):
    rng = random.Random(1)
    known = [PUZZLES.puzzle(Rule(None, "all", rng.choice(PUZZLES.known)), rng) for _ in range(24)]
    params = SamplingParams(temperature=0, max_tokens=16, stop="\n")
    share = []
    for tasks in (known, HELDOUT):
        outs = engine.generate([FORM.ask(task, engine.tokenizer) for task in tasks], params, progress=False)
        texts = [out.outputs[0].text + "\n" for out in outs]
        share.append(sum(text == FORM.answer(task.tests[0].output) for text, task in zip(texts, tasks, strict=True)))
    assert share[0] >= 20
    assert share[1] <= 4


def test_the_recipe_writes_a_checkpoint(tmp_path):
    """A model too small and too short to learn anything, but every step of the way is taken."""
    shape = Recipe(vocab_size=512, hidden=64, heads=2, layers=1, rows=2)
    recipe = PuzzleRecipe(shape, copy_steps=1, steps=3, tokenizer_documents=200)
    report = train_puzzle_model(tmp_path / "model", recipe, progress=False)
    assert report["steps"] == 3
    assert train_puzzle_model(tmp_path / "again", recipe, progress=False) == report
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert weights[0] == weights[1]
    assert len(Engine.from_pretrained(tmp_path / "model", device="cpu").logits(["[[1, 2]] -> "])[0]) > 3
