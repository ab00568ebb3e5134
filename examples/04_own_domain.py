"""A task of your own: implement Domain, and the outer loop does the rest.

The toy task: each context is a person with a coat; a self-edit is what the model writes about both; its adapter is
asked for the coat's colour. A self-edit that states it teaches, anything else does not. A template that always states
it is a second source of self-edits, beside the policy.

Run it with: python examples/04_own_domain.py DIRECTORY
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import Candidate, InvalidSelfEditError, SelfEditSource
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.restem import ReSTEM
from seal_engine.runs import rows, table
from seal_engine.tiny import MODEL

LORA = LoraConfig(r=8, lora_alpha=32, target_modules=("q_proj", "v_proj"))


COLOURS = ("orange", "purple", "green", "yellow", "red", "blue")


class Coats:
    """People and the colours of their coats as a Domain."""

    answer_params = SamplingParams(temperature=0, max_tokens=4, stop="\n")

    def __init__(self):
        names = {
            "train": ["Ann", "Bob", "Cleo", "Dan", "Eve", "Finn"],
            "held out": ["Gil", "Hana", "Ivo", "June", "Kai", "Lou"],
        }
        self.splits = {split: dict(zip(people, COLOURS, strict=True)) for split, people in names.items()}
        self.colours = self.splits["train"] | self.splits["held out"]

    def contexts(self, split: str) -> Sequence[str]:
        """The people of a split."""
        return list(self.splits[split])

    def prompt(self, context: str) -> str:
        """What the policy continues with a self-edit: in the words that the shipped model was trained on."""
        return f"The {self.colours[context]} coat hangs outside. Such is the life of {context}.\nNotes:\n"

    def logits_hook(self, max_tokens: int) -> None:
        """Self-edits are free text."""

    def job(self, context: str, self_edit: str) -> TrainJob:
        """Train on the lines of the self-edit."""
        lines = [line for line in self_edit.splitlines() if line.strip()]
        if not lines:
            raise InvalidSelfEditError("no text")
        return TrainJob(lines, LORA, learning_rate=2e-2, num_epochs=10, append_eos=True)

    def questions(self, context: str) -> Sequence[str]:
        """One question."""
        return [self._question(context)]

    def grade(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
        """1.0 where the answer is the colour."""
        return [[float(answer.strip() == self.colours[context]) for answer in answers] for context, answers in answered]

    def baselines(self) -> Mapping[str, Callable[[str], Sequence[Candidate]]]:
        """The base model, asked without an adapter."""
        return {"no adapter": lambda context: [Candidate(context, None, self.questions(context))]}

    def sources(self) -> Mapping[str, SelfEditSource]:
        """A question with its answer, for each person."""
        return {"template": SelfEditSource(lambda contexts, _: [[self._stated(context)] for context in contexts])}

    def _question(self, context: str) -> str:
        return f"What colour does {context} wear?"

    def _stated(self, context: str) -> str:
        return f"{self._question(context)} {self.colours[context]}"


def main(directory: str | Path) -> str:
    """Run one round in a directory, which a second call goes on with; returns the table."""
    config = LoopConfig(rounds=1, contexts=6, self_edits=3, repeats=1, max_tokens=20)
    engine = Engine.from_pretrained(MODEL, dtype="float32")
    with Ledger.open(directory, {"task": "coats"}) as ledger:
        ReSTEM(engine, Coats(), config, ledger, progress=False).run()
        return table(rows(ledger))


if __name__ == "__main__":
    print(main(sys.argv[1]))
