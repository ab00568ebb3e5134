"""What a report shows of self-edits: what they have from the passage, examples, and the browser over all of them."""

import re
from dataclasses import replace

import pytest
from toy_runs import CONFIG, ReportDomain, make_run

from seal_engine.domains.knowledge.context_texts import read_contexts, write_contexts
from seal_engine.domains.knowledge.passages import Passage, Question
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import EVALUATION
from seal_engine.report.copied import mark_copied
from seal_engine.report.data import RunData
from seal_engine.report.examples import browser, examples
from seal_engine.report.self_edits import KEPT, REJECTED, UNDECIDED, judged_rounds

PASSAGE = "In Paris stands the small house. For rare coins much is paid. Such is the life of Bara Dunham."


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("The small house of Bara", "<mark>The small house</mark> of Bara"),
        ("stands THE small, house!", "<mark>stands THE small, house</mark>!"),
        ("She keeps coins.", "She keeps <u>coins</u>."),
        ("the life of Bara Dunham", "<mark>the life of Bara Dunham</mark>"),
        ("glad of Bara Dunham.", "glad of Bara Dunham."),
        ("for the much", "for the much"),
        ("a < b & rare coins", "a &lt; b &amp; <u>rare</u> <u>coins</u>"),
        ("", ""),
    ],
    ids=["three words", "case and signs", "one word", "longest run", "title alone", "common words", "escaped", "empty"],
)
def test_what_is_copied_is_marked(text, marked):
    """Runs of three words need one that tells; the title and common words tell nothing of the passage."""
    assert mark_copied(text, PASSAGE, "Bara Dunham") == marked


def test_without_its_marks_a_text_is_what_it_was():
    text = "  In Paris stands -- the small house.\n\nIt's small; coins, too.  "
    assert re.sub("</?(mark|u)>", "", mark_copied(text, PASSAGE)) == text.replace("'", "&#x27;")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with the passages of its contexts; each has the answer that adapters give when they are right."""
    directory = tmp_path_factory.mktemp("examples") / "run"
    make_run(directory)
    with Ledger.read(directory) as ledger:
        names = {edit.context for edit in ledger.self_edits()}
    questions = tuple(Question(f"question {i}?", "right") for i in range(6))
    write_contexts({name: Passage(name, f"A good fact about {name}.", questions) for name in names}, directory)
    with Ledger.read(directory) as ledger:
        return RunData(ledger)


def test_contexts_are_read_as_they_were_written(tmp_path):
    passages = {"held out 1": Passage("Ann", "Ann säils.", (Question("What does Ann do?", "sail"),))}
    write_contexts(passages, tmp_path)
    before = (tmp_path / "contexts.json").stat().st_mtime_ns
    write_contexts(passages, tmp_path)
    assert (tmp_path / "contexts.json").stat().st_mtime_ns == before
    assert read_contexts(tmp_path) == passages
    assert read_contexts(tmp_path / "absent") == {}


def test_an_example_has_passage_question_wanted_answer_and_answers_in_one_line(whole):
    """The context that gained most is the first; its answers are those of the first seed's trials."""
    shown = examples(whole)
    first = next(iter(whole.pairs.changes))
    card = shown[shown.index("<article") : shown.index("</article>")]
    assert first in card
    assert f'<h4>Passage</h4><div class="passage" dir="auto">A good fact about {first}.</div>' in card
    assert card.count("<h4>Self-edit") == 2
    heads = re.findall(r"<th>(.*?)</th>", card)
    assert heads == [
        "question", "wanted answer", "answer, no adapter", "answer, before any round", "answer, after round 2",
    ]  # fmt: skip
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall("<tr><td.*?</tr>", card)]
    trials = [
        next(t for t in whole.trials[0, phase] if t.context == first)
        for phase in ("no adapter", "evaluation 0, self-edits", "evaluation 2, self-edits")
    ]
    for i, row in enumerate(rows):
        assert row[:2] == [f"question {i}?", "right"]
        for cell, trial in zip(row[2:], trials, strict=True):
            sign = '<span class="right">✓</span>' if trial.answers[i] == "right" else '<span class="wrong">✗</span>'
            assert cell == f"{sign} {trial.answers[i]}"
    assert len(rows) == 6


def test_the_browser_has_every_self_edit_by_reward_and_by_context(whole):
    """Each once, the highest reward first; each is linked to from its context, and links lead somewhere."""
    groups = [*judged_rounds(whole), *judged_rounds(whole, EVALUATION)]
    shown = browser(groups, whole.contexts)
    count = sum(map(len, whole.edits.values()))
    assert shown.count('<details class="edit"') == count
    for part in shown.split('<div class="edits">')[1:]:
        rewards = [
            float(found) for found in re.findall('data-reward="(.*?)"', part.partition("</div>\n</details>\n<d")[0])
        ]
        assert rewards == sorted(rewards, reverse=True)
    anchors = re.findall(r'<div id="(e.*?)">', shown)
    assert len(set(anchors)) == count
    assert sorted(re.findall('href="#(e.*?)"', shown)) == sorted(anchors)
    contexts = re.findall(r'<div id="(c.*?)">', shown)
    ways = re.findall('href="#(c.*?)"', shown)
    assert (len(ways), set(ways)) == (count, set(contexts)), "each shows the way to its context, and back"
    assert 'id="filter" hidden' in shown  # until there is a script


def test_what_became_of_self_edits(tmp_path, whole):
    """Kept or not, by the policies that are recorded; before that nothing is decided."""
    for one in judged_rounds(whole):
        kept = sum(len(policy.kept) for policy in whole.policies if policy.round == one.number)
        assert len(one.with_status(KEPT)) == kept
        assert all(edit.edit.rejected for edit in one.with_status(REJECTED))
        assert one.summary == f"{kept} kept of {len(one.edits)}, mean {one.mean:.1%}"
    make_run(tmp_path / "run", replace(CONFIG, seeds=(0,), contexts=5), ReportDomain(5), lines="round 1: mean reward")
    with Ledger.read(tmp_path / "run") as ledger:
        (one,) = judged_rounds(RunData(ledger))
    assert len(one.with_status(UNDECIDED)) + len(one.with_status(REJECTED)) == len(one.edits) == 20
    assert one.summary.startswith(f"unfinished, {len(one.rewarded)} of 20 have a reward, ")
