"""The puzzle miniature as a task: the shipped model learns which directive suits which kind of puzzle."""

from seal_engine.domains.few_shot.directive import OUTPUT_TOKENS, Directive
from seal_engine.domains.few_shot.task import PUBLISHED, FewShot, FewShotConfig
from seal_engine.engine import Engine
from seal_engine.loop.domain import SelfEditSource
from seal_engine.tiny.puzzles import PROMPT, PUZZLE_MODEL, SELF_EDIT, Puzzles
from seal_engine.types import require

TRAIN_PUZZLES, HELD_OUT_PUZZLES = 96, 24
# For puzzles of which turned copies mislead, and for those that need such copies.
PLAIN = Directive(False, False, False, False, OUTPUT_TOKENS, 5e-3, 4)
TURNED = Directive(True, False, False, False, OUTPUT_TOKENS, 5e-3, 2)
BEST_OF_TWO = "best of two directives (oracle)"
# What was found to work for this model; the published recipe's numbers are for one of a billion parameters.
PUZZLE_MINIATURE = {
    **PUBLISHED,
    "model": str(PUZZLE_MODEL),
    "dtype": "float32",
    "contexts": 32,
    "self_edits": 6,
    "rounds": 3,
    "temperature": 1.0,
    "max_tokens": 64,
    "keep": "top",
    "keep_fraction": 0.15,
    "keep_reward": 0.6,
    "policy_update": "adapter",  # merged, it would also change what the inner loop starts from
    "policy_alpha": 32.0,
    "policy_learning_rate": 4e-3,
    "policy_lr_scheduler": "linear",
    "policy_epochs": 6,
    "policy_batch_size": 4,
    "few_shot_prompt_template": str(PROMPT),
    "directive_template": str(SELF_EDIT),
    "rank": 16,
    "alpha": 32.0,
    "targets": ("all-linear",),
    "lr_scheduler": "linear",
    "warmup_steps": 0,
    "max_tasks": 16,
    "max_steps": 16,
    "max_sequence_tokens": 96,
    "recolour": False,
    "leave": (2,),
    "vote_leave": 0,
    "vote_orders": 0,
    "vote_transforms": False,
    "attempts": 1,
    "answer_tokens": 44,
    "fixed_directive": PLAIN.to_json(),
}


def make_puzzle_miniature(config: FewShotConfig, engine: Engine) -> FewShot:
    """Puzzles of rules that the model never met."""
    for name in ("challenges", "held_out_challenges"):
        require(not getattr(config, name), name, getattr(config, name), "nothing: the miniature has puzzles of its own")
    puzzles = Puzzles()
    train, held_out = puzzles.puzzles("train", TRAIN_PUZZLES), puzzles.puzzles("heldout", HELD_OUT_PUZZLES)
    domain = FewShot(config, engine, train, held_out)
    both = [PLAIN.to_json(), TURNED.to_json()]
    domain.add_source(BEST_OF_TWO, SelfEditSource(lambda contexts, _: [both] * len(contexts), aggregate="max"))
    return domain
