"""The report of a run: what its page says, that nothing in it is taken for HTML, and that odd runs give a page, too.

Runs are those of the real loop over a toy engine and domain (see toy_loop), so names of phases are the loop's own.
"""

import base64
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import matplotlib
import pytest

from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import Candidate, InvalidSelfEditError
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import PolicyUpdate, SelfEdit, Trial
from seal_engine.loop.restem import ReSTEM
from seal_engine.report.data import RunData
from seal_engine.report.page import write_report
from seal_engine.runs import rows
from seal_engine.sampling.requests import Completion, RequestOutput, SamplingParams
from seal_engine.types import InputError
from toy_loop import ToyDomain, ToyEngine

CONFIG = LoopConfig(
    seeds=(0, 1, 2),
    rounds=2,
    contexts=24,
    self_edits=4,
    repeats=2,
    resamples=0,
    trials_per_step=40,
    continued_pretraining=1,
)
SETTINGS = {"task": "knowledge", "answer_stop": "\n", "model": "/models/toy-1B", "sha256": {"data": "00ff"}}
PICTURES = ["accuracy", "contexts", "kept", "time"]
NASTY = "<script>alert('x')</script> & \"quotes\" </pre> \x1b[31m \x00 \u202e עברית 🙂 $\\frac{1}{2}$"


class ReportEngine(ToyEngine):
    """Answers better the more good facts its adapter has seen; writes more of them the more it has learned."""

    def generate(self, prompts, params, adapters, **options):
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        adapters = adapters if isinstance(adapters, list) else [adapters] * len(prompts)
        outputs = []
        for prompt, own, adapter in zip(prompts, params, adapters, strict=True):
            learned = adapter.text if adapter is not None else ""
            draw = random.Random(f"{prompt} {learned} {own.seed}")
            if prompt.startswith("write"):
                good = min(9, 2 + sum(text.count("good") for text in self.merged) // 60)
                facts = [draw.choice(["a good fact"] * good + ["a vague one"] * 4) for _ in range(draw.randrange(2, 9))]
                text = draw.choice([f"About {prompt}:\n" + "\n".join(facts)] * 12 + ["refuse me", "refuse me too"])
            else:
                known = 0.9 if prompt.startswith("reading") else min(0.9, 0.12 + 0.09 * learned.count("good"))
                text = "right" if draw.random() < known else "wrong"
            outputs.append(RequestOutput(prompt, [], [Completion(0, text, [*map(ord, text), 9], "stop")]))
        return outputs


class ReportDomain(ToyDomain):
    """Contexts with names as passages have them, some questions each, and baselines."""

    def __init__(self, contexts=24, name="{split} {i}: History of the {i}th river, part {split}"):
        super().__init__(contexts)
        self.name = name

    def contexts(self, split):
        return [self.name.format(split=split, i=i) for i in range(self.count)]

    def job(self, context, self_edit):
        if "refuse" in self_edit:
            raise InvalidSelfEditError("no text to train on" if "too" in self_edit else "nothing but a heading")
        return super().job(context, self_edit)

    def questions(self, context):
        return [f"{context}, {i}?" for i in range(6)]

    def baselines(self):
        def trained(context, text):
            job = super(ReportDomain, self).job(context, f"{context} {text}")
            return [Candidate(context, job, self.questions(context))]

        return {
            "no adapter": lambda c: [Candidate(c, None, self.questions(c))],
            "passage in the prompt": lambda c: [Candidate(c, None, [f"reading {q}" for q in self.questions(c)])],
            "passage only": lambda c: trained(c, "good"),
            "passage only, equal steps": lambda c: trained(c, "good good"),
        }


class Stopped(Exception):  # noqa: N818
    """A run that was interrupted."""


def make_run(directory, config=CONFIG, domain=None, lines=None, engine=None):
    """A run, or its beginning: until it has said so many lines. Returns its engine."""
    engine, said = engine or ReportEngine(), []

    def say(line):
        said.append(line)
        if len(said) == lines:
            raise Stopped

    with Ledger.open(directory, SETTINGS | asdict(config)) as ledger:
        try:
            ReSTEM(engine, domain or ReportDomain(), config, ledger, say).run()
        except Stopped:
            assert lines is not None
    return engine


class Page(HTMLParser):
    """A page's tags, attributes and text; fails where tags are not closed in order."""

    def __init__(self, file):
        super().__init__()
        self.source, self.open, self.tags, self.attributes, self.words = file.read_text("utf-8"), [], Counter(), [], []
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def cells(self):
        return [tuple(re.findall(r"<td.*?>(.*?)</td>", line)) for line in self.source.split("\n") if "<td" in line]


TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "small", "p", "strong", "code", "table",
    "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img", "details", "summary", "pre", "ol", "li",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run, its engine, and its page."""
    directory = tmp_path_factory.mktemp("report") / "run"
    engine = make_run(directory)
    return directory, engine, Page(write_report(directory))


@pytest.fixture
def without_matplotlib(monkeypatch):
    """As where it is not installed; which is also quicker, as nothing is drawn."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "seal_engine.report.plots", raising=False)


def test_the_page_alone_is_enough(whole):
    directory, _, page = whole
    assert set(page.tags) <= TAGS
    assert {name for name, _ in page.attributes} <= {
        "lang", "charset", "name", "http-equiv", "content", "class", "alt", "src", "dir",
    }  # fmt: skip
    shown = [
        base64.b64decode(value.removeprefix("data:image/png;base64,")) for k, value in page.attributes if k == "src"
    ]
    assert shown == [(directory / f"{name}.png").read_bytes() for name in PICTURES]
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
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
    assert f"mean of 3 seeds: {before}% before any round, {after}% after round 2." in page.text
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
    folds = whole[2].source.index("<details>")
    assert all(whole[2].source.index(f"<td>{line[0]}</td><td>") < folds for line in differing)
    assert whole[2].source.index("<td>top_p</td>") > folds


def test_what_is_counted_and_paired(whole):
    directory, engine, page = whole
    with Ledger.read(directory) as ledger:
        data, trials = RunData(ledger), ledger.trials()
    trained = sum(job.checkpoint_dir is None for jobs in engine.trained for job in jobs)
    assert len(data.adapters) == trained
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
    rewards = [(fmean(r.kept_rewards), fmean(r.other_rewards)) for r in data.rounds]
    assert all(kept > others for kept, others in rewards)


def test_equal_ledgers_give_equal_bytes(whole):
    """Whatever the user's own style of pictures is."""
    directory, _, _ = whole
    files = [directory / name for name in ("report.html", *(f"{name}.png" for name in PICTURES))]
    first = [file.read_bytes() for file in files]
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 20, "axes.grid": True}):
        write_report(directory)
        assert matplotlib.rcParams["font.size"] == 30
    assert [file.read_bytes() for file in files] == first


def test_untrusted_text_is_shown_as_text(tmp_path):
    """Names, texts, answers and reasons; names stand in pictures, too, where dollars are no formulas."""

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
    page = Page(write_report(tmp_path / "run"))
    assert set(page.tags) <= TAGS
    assert "<script" not in page.source
    assert any(
        key == "content" and value.startswith("default-src 'none'; img-src data:") for key, value in page.attributes
    )
    shown = NASTY.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
    # Of a context, of a self-edit for it, of an answer, and of a reason.
    for text in (f"{shown} held out 1", f"About write {shown} held out 1", f"right{shown}", f"heading: {shown}"):
        assert text in page.text


@pytest.mark.parametrize("lines", [1, 4, 8, 11, 13, 16, 20])
def test_a_run_that_goes_on(tmp_path, without_matplotlib, lines):
    """At any moment, with the ledger held by the run."""
    config = replace(CONFIG, contexts=5)
    make_run(tmp_path / "run", config, ReportDomain(5), lines)
    with Ledger.open(tmp_path / "run", SETTINGS | asdict(config)):
        page = Page(write_report(tmp_path / "run"))
    assert "The run is not over" in page.text
    assert page.tags["h2"] == 6
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_a_run_that_has_just_begun(tmp_path):
    with Ledger.open(tmp_path / "run", SETTINGS | asdict(CONFIG)):
        page = Page(write_report(tmp_path / "run"))
    for said in (
        "just begun",
        "Nothing has been measured",
        "No round has been finished",
        "no evaluation after a round",
    ):
        assert said in page.text
    assert not list((tmp_path / "run").glob("*.png"))
    make_run(tmp_path / "run", lines=2)
    write_report(tmp_path / "run")
    assert sorted(file.stem for file in (tmp_path / "run").glob("*.png")) == ["accuracy", "time"]


def test_one_seed_and_no_rounds(tmp_path):
    make_run(tmp_path / "run", replace(CONFIG, seeds=(7,), rounds=0, continued_pretraining=0))
    page = Page(write_report(tmp_path / "run"))
    assert "The run is over" in page.text
    assert "<strong>" not in page.source
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
    assert len(page.source) < 2e6


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
    assert "no grade an answer" in page.text
    assert "Could not be trained: diverged" in page.text
    assert "2 contexts, seed 0 alone: 1 better, 0 worse, 1 the same" in page.text
    assert "3 contexts are left out" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_without_matplotlib(whole, tmp_path, without_matplotlib):
    make_run(tmp_path / "run", replace(CONFIG, seeds=(0,), rounds=1))
    page = Page(write_report(tmp_path / "run"))
    assert "pip install 'seal-engine[plot]'" in page.text
    assert not page.tags["img"]
    assert page.tags["h2"] == whole[2].tags["h2"]
    assert not list((tmp_path / "run").glob("*.png"))


def test_another_import_that_fails_is_not_taken_for_matplotlib(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "seal_engine.report.plots", None)
    with pytest.raises(ModuleNotFoundError, match=r"report\.plots"):
        write_report(whole[0])


def test_the_page_is_replaced_whole_or_not_at_all(tmp_path, without_matplotlib, monkeypatch):
    make_run(tmp_path / "run", replace(CONFIG, seeds=(0,), rounds=0))
    page = write_report(tmp_path / "run")
    page.write_text("the one before")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match=r"report\.html: cannot be written: No space"):
        write_report(tmp_path / "run")
    assert page.read_text() == "the one before"
    assert not list((tmp_path / "run").glob(".partial*"))


def test_no_run(tmp_path):
    with pytest.raises(InputError, match="the directory of a run"):
        write_report(tmp_path)
