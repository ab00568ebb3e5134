"""The report of a run: what its page says, that nothing in it is taken for HTML, and that odd runs give a page, too.

Runs are those of the real loop over a toy engine and domain (see toy_loop), so names of phases are the loop's own.
"""

import hashlib
import re
from base64 import b64encode
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import pytest
from toy_runs import CONFIG, SETTINGS, Page, ReportDomain, ReportEngine, make_run

from seal_engine.domains.knowledge.context_texts import write_contexts
from seal_engine.domains.knowledge.passages import Passage, Question
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import InvalidSelfEditError
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import PolicyUpdate, SelfEdit, Trial
from seal_engine.loop.restem import ReSTEM
from seal_engine.report.data import RunData
from seal_engine.report.page import write_report
from seal_engine.report.self_edits import KEPT, NOT_KEPT, judged_rounds
from seal_engine.runs import rows
from seal_engine.types import InputError

PICTURES = ["accuracy", "contexts", "losses", "rewards", "time"]
NASTY = "<script>alert('x')</script> & \"quotes\" </pre> \x1b[31m \x00 \u202e עברית 🙂 $\\frac{1}{2}$"


TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "small", "p", "strong", "b", "table",
    "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details", "summary", "pre", "div", "section",
    "article", "label", "select", "option", "input", "span", "mark", "u", "script", "a", "svg", "line", "circle",
    "rect", "text", "polyline", "polygon",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run, its engine, and its page."""
    directory = tmp_path_factory.mktemp("report") / "run"
    engine = make_run(directory)
    return directory, engine, Page(write_report(directory))


def test_the_page_alone_is_enough(whole):
    """It fetches nothing, runs nothing but the script whose digest its policy names, and has its pictures inside."""
    directory, _, page = whole
    assert set(page.tags) <= TAGS
    assert not {name for name, _ in page.attributes if name.startswith("on") or name in ("src", "style")}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert page.tags["svg"] == len(PICTURES)
    assert sorted(file.stem for file in directory.glob("*.svg")) == PICTURES
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert ("content", policy) in page.attributes
    assert "url(" not in page.source
    assert not re.search(r"https?:", page.source)
    assert not list(directory.glob(".partial*"))


def test_the_page_says_what_the_ledger_holds(whole):
    directory, _, page = whole
    cells = page.cells()
    with Ledger.read(directory) as ledger:
        for row in rows(ledger):
            numbers = [f"{100 * value:.1f}" for value in (row.mean, row.deviation, row.standard_error)]
            assert (row.name, *numbers, "3") in cells
        found = {entry["phase"]: [] for entry in ledger.metrics() if "accuracy" in entry}
        for entry in ledger.metrics():
            if "trials" in entry:
                found[entry["phase"]].append(entry["accuracy"])
        self_edits, policies = ledger.self_edits(), ledger.policies()
    before, after = (f"{100 * fmean(found[f'evaluation {r}, self-edits']):.1f}" for r in (0, 2))
    for shown in (f"{before} self-edits", f"{after} self-edits"):
        assert (shown in page.text) == (shown == f"{after} self-edits")  # the line is named at its end
    first, last = (fmean(found[f"evaluation {r}, self-edits"]) for r in (0, 2))
    assert f"<h1>Reward taught the writer: {first:.0%} to {last:.0%} in two rounds</h1>" in page.source
    assert "The run is over. Last recorded: seed 2, evaluation 2, at 20" in page.text
    for number in (1, 2):
        kept = sum(len(policy.kept) for policy in policies if policy.round == number)
        edits = [edit for edit in self_edits if edit.phase == f"round {number}"]
        rejected = sum(edit.rejected is not None for edit in edits)
        assert any(line[:4] == (str(number), str(len(edits)), str(rejected), str(kept)) for line in cells)
    for reason in ("no text to train on", "nothing but a heading"):
        count = sum(edit.rejected == reason for edit in self_edits)
        assert count > 0
        assert any(line[:2] == (reason, str(count)) for line in cells)


def test_the_page_says_which_self_edits_are_kept(whole, tmp_path):
    """By the settings of the run, whichever rule they choose; and what a gain has to be compared with."""
    said = "Kept, of each seed: the one with the highest reward of each context, if it is at least 0%."
    assert said in whole[2].text
    assert "a run with --shuffle-rewards is that control" in whole[2].text
    for keep, rule in (("top", "the 30% with the highest rewards"), ("gain", "those with a reward above")):
        config = replace(CONFIG, seeds=(0,), rounds=1, contexts=3, keep=keep, keep_fraction=0.3, keep_reward=0.25)
        make_run(tmp_path / keep, config)
        page = Page(write_report(tmp_path / keep))
        assert re.search(f"Kept, of each seed: {rule}.*?, if it is at least 25%", page.text)
    make_run(tmp_path / "control", replace(CONFIG, seeds=(0,), rounds=1, shuffle_rewards=True))
    assert "--shuffle-rewards is that control" not in Page(write_report(tmp_path / "control")).text


def test_settings_that_differ_come_first(whole):
    cells = whole[2].cells()
    nothing = "&quot;&quot;"
    differing = [
        ("answer_stop", "&quot;\\n&quot;", nothing),
        ("model", "/models/toy-1B", nothing),
        ("seeds", "[0, 1, 2]", "[0]"),
        ("self_edits", "4", "5"),
    ]
    for line in (*differing, ("top_p", "0.95"), ("data", "00ff")):
        assert line in cells
    folds = whole[2].source.index("<summary>All other settings")
    assert all(whole[2].source.index(f"<td>{line[0]}</td><td>") < folds for line in differing)
    assert whole[2].source.index("<td>top_p</td>") > folds


def test_what_is_counted_and_paired(whole):
    directory, engine, page = whole
    with Ledger.read(directory) as ledger:
        data, trials = RunData(ledger), ledger.trials()
    trained = sum(job.checkpoint_dir is None for jobs in engine.trained for job in jobs)
    assert len(data.adapters) == trained
    assert data.unfinished_rounds == []
    assert ("adapters trained", f"{trained:,}, and 6 policy updates") in page.cells()
    assert sum(sum(parts.values()) for parts in data.seconds_by_stage.values()) == pytest.approx(
        sum(step.seconds for step in data.steps)
    )
    assert list(data.seconds_by_stage) == [
        "baselines", "evaluation 0", "round 1", "evaluation 1", "round 2", "evaluation 2",
    ]  # fmt: skip
    assert all(parts["training and asking"] > 0 for parts in data.seconds_by_stage.values())
    assert [stage for stage, parts in data.seconds_by_stage.items() if parts["policy update"]] == ["round 1", "round 2"]
    accuracy = {
        (t.seed, t.phase, t.context): t.accuracy for t in trials if re.fullmatch(r"evaluation \d, self-edits", t.phase)
    }
    for context, change in data.pairs.changes.items():
        pairs = [[accuracy.get((s, f"evaluation {r}, self-edits", context)) for r in (0, 2)] for s in range(3)]
        assert change == pytest.approx(fmean(b - a for a, b in pairs if a is not None and b is not None), abs=1e-6)
    assert list(data.pairs.changes.values()) == sorted(data.pairs.changes.values(), reverse=True)
    for one in judged_rounds(data):
        kept, others = ([edit.reward for edit in one.with_status(status)] for status in (KEPT, NOT_KEPT))
        assert fmean(kept) > fmean(others)


def test_equal_ledgers_give_equal_bytes(whole):
    directory, _, _ = whole
    files = [directory / name for name in ("report.html", *(f"{name}.svg" for name in PICTURES))]
    first = [file.read_bytes() for file in files]
    write_report(directory)
    assert [file.read_bytes() for file in files] == first


def test_untrusted_text_is_shown_as_text(tmp_path):
    """Names, texts, answers, reasons, passages and questions; names stand in pictures, too."""

    class Nasty(ReportDomain):
        def job(self, context, self_edit):
            try:
                return super().job(context, self_edit)
            except InvalidSelfEditError as error:
                raise InvalidSelfEditError(f"{error}: {NASTY}") from None

        def grade(self, answered):
            return super().grade([(c, [answer.removesuffix(NASTY) for answer in own]) for c, own in answered])

    class NastyEngine(ReportEngine):
        def generate(self, prompts, params, adapters, **options):
            outputs = super().generate(prompts, params, adapters, **options)
            for output in outputs:
                output.outputs[0].text += NASTY
            return outputs

    name = NASTY.replace("{", "{{").replace("}", "}}") + " {split} {i}"
    config = replace(CONFIG, contexts=12, seeds=(0,), rounds=1)
    make_run(tmp_path / "run", config, Nasty(12, name), engine=NastyEngine())
    with Ledger.read(tmp_path / "run") as ledger:
        names = {edit.context for edit in ledger.self_edits()}
    questions = tuple(Question(f"{i}? {NASTY}", f"right{NASTY}") for i in range(6))
    write_contexts({each: Passage(each, f"A passage. {NASTY}", questions) for each in names}, tmp_path / "run")
    page = Page(write_report(tmp_path / "run"))
    assert set(page.tags) <= TAGS
    assert page.source.count("<script") == 1
    shown = NASTY.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
    # Of a context, of a self-edit for it, of an answer, and of a reason.
    texts = [f"{shown} held out 1", f"About write {shown} held out 1", f"right{shown}", f"heading: {shown}"]
    for text in (*texts, f"A passage. {shown}", f"0? {shown}"):
        assert text in page.text


@pytest.mark.parametrize("lines", [1, 4, 8, 11, 13, 16, 20])
def test_a_run_that_goes_on(tmp_path, lines):
    """At any moment, with the ledger held by the run."""
    config = replace(CONFIG, contexts=5)
    make_run(tmp_path / "run", config, ReportDomain(5), lines)
    with Ledger.open(tmp_path / "run", SETTINGS | asdict(config)):
        page = Page(write_report(tmp_path / "run"))
    assert "The run is not over" in page.text
    assert page.tags["h2"] == 8
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_rounds_that_not_every_seed_has_ended(tmp_path):
    """Two seeds; the first has ended round 1 and trained the adapters of round 2, the second has done nothing yet. When
    the second has ended round 1, that round is whole."""
    config, unfinished = replace(CONFIG, contexts=5, seeds=(0, 1)), []
    for line in ("seed 0, round 2: 0", "seed 1, evaluation 1, self-edits: "):
        make_run(tmp_path / "run", config, ReportDomain(5), line)
        with Ledger.read(tmp_path / "run") as ledger:
            unfinished.append(RunData(ledger).unfinished_rounds)
    assert unfinished == [["round 1", "round 2"], ["round 2"]]


def test_a_run_that_has_just_begun(tmp_path):
    with Ledger.open(tmp_path / "run", SETTINGS | asdict(CONFIG)):
        page = Page(write_report(tmp_path / "run"))
    for said in (
        "just begun",
        "Nothing has been measured",
        "No round has been finished",
        "Nothing has been written",
        "no evaluation after a round",
    ):
        assert said in page.text
    assert not list((tmp_path / "run").glob("*.svg"))
    make_run(tmp_path / "run", lines=2)
    write_report(tmp_path / "run")
    assert sorted(file.stem for file in (tmp_path / "run").glob("*.svg")) == ["accuracy", "time"]


def test_one_seed_and_no_rounds(tmp_path):
    make_run(tmp_path / "run", replace(CONFIG, seeds=(7,), rounds=0, continued_pretraining=0))
    page = Page(write_report(tmp_path / "run"))
    assert "The run is over" in page.text
    assert "<h1>Before any round, self-edits answer " in page.source
    ((_, _, sd, se, seeds),) = [line for line in page.cells() if line[0] == "self-edits, before any round"]
    assert (sd, seeds) == ("-", "1")
    assert float(se) > 0


def test_hundreds_of_contexts_and_long_texts(tmp_path):
    class Wordy(ReportEngine):
        def generate(self, prompts, params, adapters, **options):
            outputs = super().generate(prompts, params, adapters, **options)
            for output in outputs:
                output.outputs[0].text += "&" * 5000
            return outputs

    domain, config = ReportDomain(250, "{split} {i}" + "x" * 300), LoopConfig(rounds=1, contexts=2, self_edits=1)
    domain.grade_one = lambda answer: float(answer.startswith("right"))
    with Ledger.open(tmp_path / "run", {"toy": True}) as ledger:
        ReSTEM(Wordy(), domain, config, ledger, lambda line: None).run()
    page = Page(write_report(tmp_path / "run"))
    assert re.search(r"\(cut: 2,000 of 5,\d\d\d characters\)", page.text)
    assert "&" * 2001 not in page.text
    assert page.text.count("(cut: 200 of ") >= 240
    assert "unknown to this version" in page.text
    assert len(page.source) < 8e6  # 501 self-edits, each & of which is five bytes of HTML


def odd_run(directory):
    """What the loop seldom or never writes: grades that are missing or NaN, a loss that is, half a surrogate pair."""
    nan = float("nan")

    def trial(phase, context, grades, error=None):
        return Trial(0, phase, context, 0, 0, 1, 3, 7, nan, error, ("an answer",) * len(grades), grades, 0.0)

    with Ledger.open(directory, {"task": "knowledge", "seeds": [0], "rounds": 1}) as ledger:
        for r, grade in ((0, 0.5), (1, 0.75)):
            phase = f"evaluation {r}, self-edits"
            edits = [SelfEdit(0, f"evaluation {r}", c, 0, f"half \ud800 of {c}", (1,), None, 1, None) for c in "abce"]
            edits.append(SelfEdit(0, f"evaluation {r}", "d", 0, " ", (), None, 1, "nothing \udfff"))
            ledger.finish(f"seed 0, evaluation {r}, writing", self_edits=edits)
            trials = [
                trial(phase, "a", (grade, 1.0, None)),
                trial(phase, "b", (None, None)),
                trial(phase, "c", (), "diverged"),
                trial(phase, "e", (nan, 1.0)),
            ]
            ledger.finish(f"seed 0, {phase}, trials 0", trials=trials)
            metrics = {"seed": 0, "phase": phase, "accuracy": 0.25, "trials": 3}
            ledger.finish(f"seed 0, {phase}, accuracy", metrics=metrics)
        for name, accuracy in (("not a number", nan), ("nothing graded", None)):
            metrics = {"seed": 0, "phase": name, "accuracy": accuracy, "trials": 1}
            ledger.finish(f"seed 0, {name}, accuracy", metrics=metrics)
        ledger.finish("seed 0, round 1", policy=PolicyUpdate(0, 1, None, (), 0, nan, 0.0), metrics={"seed": 0})


def test_numbers_that_are_missing(tmp_path):
    odd_run(tmp_path / "run")
    page = Page(write_report(tmp_path / "run"))
    cells = page.cells()
    assert not {"not a number", "nothing graded"} & {name for name, *_ in filter(None, cells)}
    assert ("0", "1", "0", "0", "not finite", "0 s") in cells
    assert ("diverged", "2", "") in cells
    assert "half ? of a" in page.text
    assert "no grade" in page.text
    assert "Could not be trained: diverged" in page.text
    assert "<h1>No clear change: 25% to 25% in one round so far</h1>" in page.source
    assert "2 held-out contexts, seed 0 alone: 1 better, 0 worse, 1 the same" in page.text
    assert "3 contexts are left out" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_the_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    make_run(tmp_path / "run", replace(CONFIG, seeds=(0,), rounds=0))
    page = write_report(tmp_path / "run")
    page.write_text("the one before")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="cannot be written: No space"):
        write_report(tmp_path / "run")
    assert page.read_text() == "the one before"
    assert not list((tmp_path / "run").glob(".partial*"))


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="the directory of a run"):
        write_report(tmp_path)
