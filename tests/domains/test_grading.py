"""Graders: strings by hand, the model itself by a scripted engine and a real one, an endpoint by a scripted client."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import seal_engine.domains.knowledge.grading as grading
from seal_engine import Engine, InputError
from seal_engine.domains.knowledge.endpoint import Endpoint, Reply
from seal_engine.domains.knowledge.grading import (
    check_template,
    contains,
    exact_match,
    grade_prompt,
    make_grader,
    normalize,
    parse_verdict,
)
from seal_engine.sampling.requests import Completion, RequestOutput

TEMPLATE = "{question}|{answer}|{prediction}"
TRIPLES = [("Who?", "She", "she"), ("What?", "It", "that"), ("When?", "Now", "later")]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("theatre Anna", "theatre anna"),
        ("U.S.A.", "usa"),
        ("rock-n-roll", "rocknroll"),  # punctuation goes before words are told apart
        ("the-end", "theend"),
        ("a\tb\n c", "b c"),
        ("ÉCOLE “x” 24\u201310", "école x 24-10"),  # typographic twins count as ASCII's
        ("E\u0301cole", "école"),  # a decomposed accent
        ("$1.5 million.", "1.5 million"),  # the point belongs to the number
        ("1,500,000", "1500000"),
        ("1,5", "1,5"),
        (".5 or 0.5", ".5 or 0.5"),
        ("10:30, 1/2", "10:30 1/2"),
        ("-5 to \u22127", "-5 to -7"),  # a sign
        ("well-known", "wellknown"),
        ("The", ""),
        ("", ""),
    ],
)
def test_normal_forms(text, normal):
    assert normalize(text) == normal


# (answer, gold, exact match, contained)
ANSWERS = [
    ("Denver Broncos", "Denver Broncos", 1, 1),
    ("the Denver Broncos.", "Denver Broncos", 1, 1),
    ("It was the Denver Broncos who won.", "denver broncos", 0, 1),
    ("Broncos of Denver", "Denver Broncos", 0, 0),
    ("Denver's Broncos", "Denver Broncos", 0, 0),
    ("Denver", "Denver Broncos", 0, 0),
    ("1850", "185", 0, 0),  # whole words
    ("In 1750-1840", "1750\u20131840", 0, 1),
    ("15 million", "1.5 million", 0, 0),  # a dropped point made them the same
    ("about 1.5 million", "1.5 million", 0, 1),
    ("1030", "10:30", 0, 0),
    ("12", "1/2", 0, 0),
    ("5 degrees", "-5 degrees", 0, 0),
    ("5", ".5", 0, 0),
    ("the year 1,066", "1066", 0, 1),
    ("it is Rock \u2019n\u2019 roll", "rock 'n' roll", 0, 1),
    ("cafe\u0301", "café", 1, 1),
    ("over the Santa  Clara, California", "Santa Clara, California", 0, 1),
    ("end of the game", "the end of game", 1, 1),  # articles do not count
    ("", "Denver", 0, 0),
    (" \n", "Denver", 0, 0),
    ("", "The", 0, 0),  # nothing is left of the right answer: it is compared as it is
    ("the", "The", 1, 1),
    ("a", "The", 0, 0),
    ("It is A", "A", 0, 1),
    ("$", "$", 1, 1),
    ("%", "$", 0, 0),
    ("x", "", 0, 0),
    ("", "", 0, 0),
]


@pytest.mark.parametrize(("answer", "gold", "exact", "contained"), ANSWERS)
def test_strings(answer, gold, exact, contained):
    assert exact_match(answer, gold) == exact
    assert contains(answer, gold) == contained
    assert make_grader("exact")([("Q?", gold, answer)]) == [exact]
    assert make_grader("contains")([("Q?", gold, answer)]) == [contained]


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_an_answer_contains_itself(before, gold, after):
    assert exact_match(gold, gold) == float(bool(gold.strip()))
    assert contains(f"{before} {gold} {after}", gold) == float(bool(gold.strip()))
    assert exact_match(before, gold) <= contains(before, gold)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        *((text, 1.0) for text in ("yes", " Yes.", "YES!", "\n\nyes\nQuestion: no", "**Yes**", '"yes"', "yes,\n")),
        *((text, 1.0) for text in ("Yes, it does.", "Yes, it is", "Yes it does", "**Yes** - the same")),
        *((text, 0.0) for text in ("no", "No.", " no\n\n", "(no)", "No, it does not.", "**No**: another town")),
        *((text, None) for text in ("", "\n", ".", "yes no", "yes/no", "no, yes", "no one", "yess", "not", "y", "1")),
        *((text, None) for text in ("maybe", "The answer is yes", "ye", "да", "Verdict: yes")),
    ],
)
def test_verdicts(text, verdict):
    assert parse_verdict(text) == verdict


def test_the_template_of_the_package():
    text = check_template(None)
    prompt = grade_prompt(text, "Who won?", "Denver", " The {answer}\n")
    assert "Question: Who won?\nReference answer: Denver\nGiven answer: The {answer}\n" in prompt
    assert prompt.endswith("yes or no:")
    assert "{question}" not in prompt


def test_braces_elsewhere_are_text():
    template = check_template('{"q": "{question}"} {0} {{answer}} {prediction}{prediction}\n\n')
    assert grade_prompt(template, "{prediction}", "\\1", "p") == '{"q": "{prediction}"} {0} {\\1} pp\n'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "template: found 'no {answer}, no {prediction}, no {question}'; accepted: text with {question}"),
        ("{question} {predicton} {answer}", "template: found 'no {prediction}'"),
        ("{Question} {answer} {prediction}", "template: found 'no {question}'"),
        (5, "template: found int 5; accepted: text"),
    ],
)
def test_templates_that_ask_nothing(template, message):
    with pytest.raises(InputError) as caught:
        make_grader("contains", template=template)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpt", {}, r"grader: found 'gpt'; accepted: one of \['exact', 'contains', 'model', 'endpoint'\]"),
        (None, {}, "grader: found None"),
        ("model", {}, "engine: found NoneType None; accepted: an Engine"),
        ("model", {"engine": "path"}, "engine: found str 'path'"),
        ("endpoint", {}, "endpoint: found NoneType None; accepted: an Endpoint"),
        ("endpoint", {"endpoint": "http://localhost"}, "endpoint: found str"),
    ],
)
def test_graders_that_cannot_be_made(name, arguments, message):
    with pytest.raises(InputError, match=message):
        make_grader(name, **arguments)


class ScriptedEngine(Engine):
    """Answers from a script, an exception's text being a request's error, and keeps what it was asked."""

    prompts: Any
    params: Any

    def __init__(self, *script: str | Exception):
        self.script = script

    def generate(self, prompts, params=None, adapters=None, progress=True, **options):  # pyright: ignore
        self.prompts, self.params, self.adapters = prompts, params, adapters
        outputs = []
        for step in self.script:
            failed = isinstance(step, Exception)
            outputs.append(
                RequestOutput(None, [], [Completion(0, "" if failed else step)], error=str(step) if failed else None)
            )
        return outputs


def test_a_chat_model_grades_by_its_template():
    """As all other prompts are sent with --chat: without it a chat model is asked in a form that it never saw."""

    class Chat:
        def apply_chat_template(self, turn, add_generation_prompt):
            assert add_generation_prompt
            return [turn[0]["role"], turn[0]["content"]]

    engine = ScriptedEngine("yes", "no", "no")
    engine.__dict__["tokenizer"] = Chat()
    assert make_grader("model", engine, template="{question} {answer} {prediction}", chat=True)(TRIPLES) == [
        1.0,
        0.0,
        0.0,
    ]
    question, gold, prediction = TRIPLES[0]
    assert engine.prompts[0] == ["user", f"{question.strip()} {gold.strip()} {prediction.strip()}"]


def test_the_model_grades(caplog):
    engine = ScriptedEngine(" yes", "No.", "It is.")
    grader = make_grader("model", engine, template=TEMPLATE)
    assert grader(TRIPLES) == [1.0, 0.0, None]
    assert engine.prompts == ["Who?|She|she", "What?|It|that", "When?|Now|later"]
    assert engine.params.temperature == 0
    assert engine.adapters is None
    assert caplog.messages == ["1 of 3 answers are ungraded: neither yes nor no (1)"]
    assert caplog.records[0].levelno == logging.WARNING


def test_requests_that_fail_are_ungraded(caplog):
    engine = ScriptedEngine(ValueError("prompt: too long"), "yes", ValueError("prompt: too long"))
    assert make_grader("model", engine)(TRIPLES) == [None, 1.0, None]
    assert caplog.messages == ["2 of 3 answers are ungraded: prompt: too long (2)"]


def test_nothing_is_logged_where_all_is_graded(caplog):
    assert make_grader("model", ScriptedEngine("yes", "no", "no"))(TRIPLES) == [1.0, 0.0, 0.0]
    assert make_grader("model", ScriptedEngine())([]) == []
    assert caplog.messages == []


def test_a_real_model_is_asked(tmp_path, caplog):
    """A random one says neither yes nor no, the same each time; a prompt that it cannot hold is ungraded alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.set_num_threads(1)
    directory = oracle.save(oracle.make_model("qwen2"), tmp_path)
    words = {token: i for i, token in enumerate(["<unk>", *(f"w{i}" for i in range(1, 1009))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(directory / "tokenizer.json"))
    grader = make_grader("model", Engine.from_pretrained(directory, device="cpu"))
    assert grader([*TRIPLES, ("Q?", "A", "w1 " * 600)]) == [None] * 4
    assert caplog.messages[0].startswith("4 of 4 answers are ungraded: neither yes nor no (3), prompt: ")


def test_an_endpoint_grades(monkeypatch, caplog):
    asked = []

    def answer(endpoint, prompts, max_tokens):
        asked.append((endpoint, prompts, max_tokens))
        return [Reply("Yes"), Reply(error="HTTP 500: busy"), Reply("perhaps")]

    monkeypatch.setattr(grading, "complete", answer)
    endpoint = Endpoint("http://localhost:1/v1", "judge")
    assert make_grader("endpoint", endpoint=endpoint, template=TEMPLATE)(TRIPLES) == [1.0, None, None]
    assert asked == [(endpoint, ["Who?|She|she", "What?|It|that", "When?|Now|later"], 8)]
    assert caplog.messages == [
        "2 of 3 answers are ungraded: HTTP 500 (1), neither yes nor no (1); the first: HTTP 500: busy"
    ]
