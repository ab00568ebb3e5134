"""Cutting self-edits: the published rules, derived by hand, and that no text is lost."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_engine import InputError
from seal_engine.domains.knowledge.self_edits import pieces, split

# name: (completion, its pieces with split_newlines, its pieces without)
PIECES = {
    "one line": ("A fact.", ["A fact."], ["A fact."]),
    "lines": ("1. A.\n2. B.", ["1. A.", "2. B."], ["1. A.\n2. B."]),
    "blank lines": ("\n\nA.\n \n\tB. \n\n", ["A.", "B."], ["A.\n \n\tB."]),
    "Windows": ("A.\r\nB.\r\n", ["A.", "B."], ["A.\r\nB."]),
    "rules": ("A.\n---\nB.\nC.\n---\n", ["A.", "B.", "C."], ["A.", "B.\nC."]),
    "a rule in a line": ("A.---B.", ["A.", "B."], ["A.", "B."]),
    "a longer rule": ("A.\n-----\nB.", ["A.", "--", "B."], ["A.", "--\nB."]),
    "preamble": ("Sure, a list:\n1. A.\n2. B.", ["1. A.", "2. B."], ["Sure, a list:\n1. A.\n2. B."]),
    "preamble before a blank line": ("Sure:\n\n  1. A.", ["1. A."], ["Sure:\n\n  1. A."]),
    "preamble, rule": ("Sure:\n---\n1. A.", ["1. A."], ["Sure:", "1. A."]),
    "two lines before the list": ("Sure.\nHere:\n1. A.", ["Sure.", "Here:", "1. A."], ["Sure.\nHere:\n1. A."]),
    "1. twice": ("1. A.\n1. B.", ["1. B."], ["1. A.\n1. B."]),
    "10. is not 1.": ("A.\n10. B.", ["A.", "10. B."], ["A.\n10. B."]),
    "nothing": ("", [], []),
    "nothing but space and rules": (" \n---\n\n------ ", [], []),
    "questions": (
        "Question 1: Who?\nAnswer: She.\n\nQuestion 2: What?\nAnswer: It.",
        ["Question 1: Who?\nAnswer: She.\n", "Question 2: What?\nAnswer: It."],
        ["Question 1: Who?\nAnswer: She.\n\nQuestion 2: What?\nAnswer: It."],
    ),
    "questions, the first number in the prompt": (
        " Who?\nAnswer: She.\nQuestion 2: What?\nAnswer: It.\n",
        ["Question 1: Who?\nAnswer: She.", "Question 2: What?\nAnswer: It."],
        ["Who?\nAnswer: She.\nQuestion 2: What?\nAnswer: It."],
    ),
    "questions and rules": (
        "Question 1: A?\nAnswer : B.\n---\nQuestion  22: C?\nAnswer: D.",
        ["Question 1: A?\nAnswer : B.\n---", "Question  22: C?\nAnswer: D."],
        ["Question 1: A?\nAnswer : B.", "Question  22: C?\nAnswer: D."],
    ),
    "a question in a line": (
        "Question 1: A?\nAnswer: see Question 2: there.",
        ["Question 1: A?\nAnswer: see Question 2: there."],
        ["Question 1: A?\nAnswer: see Question 2: there."],
    ),
    "questions without answers": ("Question 1: A?\nB.", ["Question 1: A?", "B."], ["Question 1: A?\nB."]),
    "answers without questions": ("A?\nAnswer: B.", ["A?", "Answer: B."], ["A?\nAnswer: B."]),
    "an unnumbered question": (
        "Question: A?\nAnswer: B.",
        ["Question: A?", "Answer: B."],
        ["Question: A?\nAnswer: B."],
    ),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name):
    completion, lines, parts = PIECES[name]
    assert pieces(completion) == lines
    assert pieces(completion, split_newlines=False) == parts


def test_sequences():
    assert split("1. A.\n2. B.", "T", " The passage.\nWhole. ") == ["T\n1. A.", "T\n2. B.", "T\nThe passage.\nWhole."]
    assert split("1. A.\n2. B.", "T") == ["T\n1. A.", "T\n2. B."]
    assert split("1. A.\n2. B.", "T", "P", split_newlines=False) == ["T\n1. A.\n2. B.", "T\nP"]
    assert split("", "T", "P") == ["T\nP"]
    assert split(" ", "T", " \n") == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((None, "T"), "completion"),
        ((["A."], "T"), "completion"),
        (("A.", None), "title"),
        (("A.", "T", 3), "passage"),
        (("A.", "T", "P", "no"), "split_newlines"),
    ],
)
def test_arguments_that_are_no_text(arguments, name):
    with pytest.raises(InputError, match=f"^{name}: found .*; accepted: "):
        split(*arguments)


LINES = st.sampled_from(
    [
        "A fact.",
        "1. One.",
        "10. Ten.",
        "---",
        "--",
        "-",
        " ",
        "\t",
        "Question 1: Who?",
        "Question 2:",
        "Answer: He.",
        "é 東",
    ]
)
TEXTS = st.lists(LINES | st.text(max_size=6), max_size=8).flatmap(
    lambda lines: st.sampled_from(["\n", "\n\n", " ", "", "\r\n"]).map(lambda end: end.join(lines))
)


def without_space(text: str) -> str:
    return re.sub(r"\s", "", text)


@given(TEXTS, st.booleans())
def test_no_text_is_lost(completion, split_newlines):
    """But for rules, a preamble that another piece follows, and the number that a first question gets."""
    made = pieces(completion, split_newlines)
    assert all(piece.strip() for piece in made)
    found, whole = without_space("".join(made)), without_space(completion)
    if split_newlines and re.search(r"Question\s+\d+:", completion) and re.search(r"Answer\s*:", completion):
        assert whole in (found, found.removeprefix("Question1:"))
        return
    # Cut marks are taken out part by part: taken out at once, what is around two of them could make a third.
    kept = without_space("".join(completion.split("---")))
    assert kept.endswith(found)
    if kept != found:
        assert split_newlines
        assert made[0].startswith("1.")
        assert len(kept) > len(found) > 0


@given(TEXTS, st.text(max_size=5), st.none() | TEXTS, st.booleans())
def test_every_sequence_is_the_title_and_some_text(completion, title, passage, split_newlines):
    made = split(completion, title, passage, split_newlines)
    own = pieces(completion, split_newlines)
    assert [text.removeprefix(f"{title}\n") for text in made[: len(own)]] == own
    assert made[len(own) :] == ([f"{title}\n{passage.strip()}"] if passage and passage.strip() else [])
