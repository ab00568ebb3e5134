"""The miniature as a task: the shipped model learns to write notes about invented people that teach well."""

import random
from collections.abc import Sequence

from seal_engine.domains.knowledge.task import Knowledge, KnowledgeConfig
from seal_engine.engine import Engine
from seal_engine.loop.domain import SelfEditSource
from seal_engine.sampling.requests import SamplingParams
from seal_engine.tiny import MODEL
from seal_engine.tiny.world import ORACLE, TEMPLATES, World, WorldPassage, write
from seal_engine.types import require

TRAIN_PASSAGES, PASSAGES_SEED = 96, 0
BEST_STYLE = "best style, by template"
# What was found to work for this model; the published recipe's numbers are for one of 7 billion parameters.
MINIATURE = {
    "model": str(MODEL),
    "dtype": "float32",
    "contexts": 30,
    "held_out_contexts": 24,
    "repeats": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_tokens": 110,
    "keep_reward": 0.5,
    "policy_rank": 32,
    "policy_alpha": 64.0,
    "policy_learning_rate": 1e-3,
    "policy_epochs": 4,
    "policy_batch_size": 4,
    "prompt_template": str(TEMPLATES / "self_edit.txt"),
    "question_template": str(TEMPLATES / "question.txt"),
    "reading_template": str(TEMPLATES / "reading.txt"),
    "with_title": False,
    "with_passage": False,
    "max_sequences": 10,
    "append_eos": True,
    "rank": 16,
    "alpha": 64.0,
    "learning_rate": 1e-2,
    "epochs": 8,
    "batch_size": 5,
    "passage_copies": 5,
    "answer_tokens": 6,
    "answer_stop": "\n",
    "grader": "exact",
}


def make_miniature(config: KnowledgeConfig, engine: Engine) -> Knowledge:
    """Passages of the shipped world: people that the model never met."""
    for name in ("data", "held_out_data"):
        require(not getattr(config, name), name, getattr(config, name), "nothing: the miniature has a world of its own")
    world, wanted = World(), config.held_out_contexts
    require(wanted <= len(world.heldout), "held_out_contexts", wanted, f"at most {len(world.heldout)}")
    train = world.passages("train", TRAIN_PASSAGES, PASSAGES_SEED)
    held_out = world.passages("heldout", config.held_out_contexts, PASSAGES_SEED)
    domain = Knowledge(config, engine, train, held_out)

    def best_style(contexts: Sequence[str], _: SamplingParams) -> list[list[str]]:
        people = (domain.passages[context] for context in contexts)
        return [[write(ORACLE, one, random.Random(one.title))] for one in people if isinstance(one, WorldPassage)]

    domain.add_source(BEST_STYLE, SelfEditSource(best_style))
    return domain
