"""The continual experiment on the miniature: sequences of invented people, learned one after another."""

from seal_engine.domains.knowledge.task import Knowledge, KnowledgeConfig
from seal_engine.engine import Engine
from seal_engine.tiny.demo import MINIATURE, PASSAGES_SEED, TRAIN_PASSAGES
from seal_engine.tiny.world import World
from seal_engine.types import require

POLICY_ROUNDS = {"seeds": (0,), "rounds": 2}  # of the knowledge miniature, which write the self-edits
CONTINUAL_MINIATURE = {
    **{name: MINIATURE[name] for name in MINIATURE if name in KnowledgeConfig.__dataclass_fields__},
    **{name: MINIATURE[name] for name in ("model", "dtype", "temperature", "top_p", "max_tokens")},
    "methods": (
        "merge", "replay", "replay-one", "distil", "gate", "replay+gate", "null-space", "consolidate", "bank", "oracle",
        "joint", "slow", "all-linear",
    ),
    "sequences": 16,
    "passages": 8,
    "held_out_contexts": 800,
}  # fmt: skip


def make_continual_miniature(config: KnowledgeConfig, engine: Engine) -> Knowledge:
    """Sequences are of people that the model never met; it is probed on those whose facts are in its weights."""
    for name in ("data", "held_out_data", "probe_data"):
        require(not getattr(config, name), name, getattr(config, name), "nothing: the miniature has a world of its own")
    world, wanted = World(), config.held_out_contexts
    require(wanted <= len(world.heldout), "held_out_contexts", wanted, f"at most {len(world.heldout)}")
    train = world.passages("train", TRAIN_PASSAGES, PASSAGES_SEED)
    held_out = world.passages("heldout", wanted, PASSAGES_SEED + 1)  # seed 0 measures the policy
    return Knowledge(config, engine, train, held_out, world.told)
