"""Runs for the tests of reports: the real loop over a toy engine and domain (see toy_loop), so names of phases are the
loop's own. And a page, read."""

import random
import re
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser

from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import Candidate, InvalidSelfEditError
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.restem import ReSTEM
from seal_engine.sampling.requests import Completion, RequestOutput, SamplingParams
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
    """A run, or its beginning: until it has said so many lines, or one with this text. Returns its engine."""
    engine, said = engine or ReportEngine(), []

    def say(line):
        said.append(line)
        if len(said) == lines or (isinstance(lines, str) and lines in line):
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
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    def cells(self):
        return [tuple(re.findall(r"<td.*?>(.*?)</td>", line)) for line in self.source.split("\n") if "<td" in line]
