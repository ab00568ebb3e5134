"""The loop over a toy engine and a toy domain: every number follows from seeds, in milliseconds.

The toy policy writes "good" or "bad"; an adapter trained on "good" answers rightly, and a policy that was fine-tuned on
"good" writes it more often.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import Candidate, InvalidSelfEditError
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.restem import ReSTEM
from seal_engine.sampling.requests import Completion, RequestOutput, SamplingParams
from seal_engine.training.jobs import TrainJob, TrainResult

WORDS = ["good", "bad", "refuse me"]


@dataclass(eq=False)
class ToyAdapter:
    text: str

    def save(self, directory):
        (Path(directory) / "adapter.txt").write_text(self.text)


class ToyEngine:
    """Answers as the texts that it was trained on say."""

    def __init__(self):
        self.merged = []
        self.trained = []
        self.end_token_id = 9
        self.config = SimpleNamespace(max_position_embeddings=2000)
        self.inputs = SimpleNamespace(token_ids=lambda prompt, name: list(map(ord, prompt)))
        self.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(map(ord, text)))

    def train(self, jobs, progress):
        self.trained.append(jobs)
        results = []
        for job in jobs:
            texts = [s if isinstance(s, str) else "".join(map(chr, s.token_ids)) for s in job.sequences]
            if any("diverge" in text for text in texts):
                results.append(TrainResult(None, [1.0], 1, "step 1: the loss is nan; the adapter diverged", 3))
            else:
                results.append(TrainResult(ToyAdapter("|".join(texts)), [0.5, 0.25], 2, num_tokens=7))
        return results

    def generate(self, prompts, params, adapters, progress):
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        adapters = adapters if isinstance(adapters, list) else [adapters] * len(prompts)
        outputs = []
        for prompt, own, adapter in zip(prompts, params, adapters, strict=True):
            if prompt.startswith("write"):
                learned = "".join([*self.merged, adapter.text if adapter else ""]).count("good")
                weights = [1 + 3 * learned, 2, 1]
                text = random.Random(own.seed).choices(WORDS, weights)[0]
            else:
                text = "right" if adapter is not None and "good" in adapter.text else "wrong"
            ids = [*map(ord, text), 9]
            outputs.append(RequestOutput(prompt, [], [Completion(0, text, ids, "stop")]))
        return outputs

    def load_adapter(self, directory):
        return ToyAdapter((directory / "adapter.txt").read_text())

    def merge(self, adapter):
        self.merged.append(adapter.text)

    def reload(self):
        self.merged = []


class ToyDomain:
    answer_params = SamplingParams(temperature=0)

    def __init__(self, contexts=12, sources=None, grade=None):
        self.count = contexts
        self._sources = sources or {}
        self.grade_one = grade or (lambda answer: float(answer == "right"))

    def contexts(self, split):
        return [f"{split} {i}" for i in range(self.count)]

    def prompt(self, context):
        return f"write {context}"

    def logits_hook(self, max_tokens):
        return None

    def job(self, context, self_edit):
        if "refuse" in self_edit:
            raise InvalidSelfEditError("no text")
        return TrainJob([self_edit])

    def questions(self, context):
        return ["first?", "second?"]

    def grade(self, answered):
        return [[self.grade_one(answer) for answer in answers] for _, answers in answered]

    def baselines(self):
        return {"no adapter": lambda c: [Candidate(c, None, self.questions(c))]}

    def sources(self):
        return self._sources


def run(directory, config, domain=None, engine=None):
    domain, engine, said = domain or ToyDomain(), engine or ToyEngine(), []
    config = replace(config, contexts=min(config.contexts, domain.count))
    with Ledger.open(directory, {"toy": True}) as ledger:
        ReSTEM(engine, domain, config, ledger, said.append).run()
        return ledger.snapshot(), said, ledger


CONFIG = LoopConfig(rounds=2, contexts=6, self_edits=3, repeats=2, resamples=1, trials_per_step=4)
