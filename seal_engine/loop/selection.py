"""Which self-edits the policy learns from."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

from seal_engine.loop.config import LoopConfig
from seal_engine.loop.records import SelfEdit, Trial

Context = TypeVar("Context")
Key = tuple[str, int]  # (context, index) of a self-edit
DIGITS = 4  # of an accuracy in SEAL's published files; the rounding decides ties


def rewards_of(trials: Sequence[Trial]) -> dict[Key, float | None]:
    """The reward of each self-edit: the mean accuracy of its adapters; None where none of them could be graded."""
    accuracies: dict[Key, list[float]] = {}
    for trial in trials:
        values = accuracies.setdefault((trial.context, trial.index), [])
        if trial.accuracy is not None:
            values.append(round(trial.accuracy, DIGITS))
    return {key: fmean(values) if values else None for key, values in accuracies.items()}


def best_of_each(rewards: Mapping[tuple[Context, int], float]) -> list[tuple[Context, int]]:
    """The published rule: of each context the self-edit with the highest reward, the first one among equals."""
    best: dict[Context, tuple[Context, int]] = {}
    for key, reward in rewards.items():
        if key[0] not in best or reward > rewards[best[key[0]]]:
            best[key[0]] = key
    return list(best.values())


def select(
    edits: Sequence[SelfEdit],
    rewards: Mapping[Key, float | None],
    base: Mapping[str, float | None],
    config: LoopConfig,
    shuffle_key: Callable[[Key], int],
) -> list[SelfEdit]:
    """The valid self-edits that `config.keep` chooses, ordered by context and index.

    base: the accuracy on each context without an adapter. shuffle_key: a random number for each self-edit, by which
    rewards are shuffled where the configuration asks for that control.
    """
    valid = {(edit.context, edit.index): edit for edit in edits if edit.rejected is None}
    known = {key: reward for key, reward in rewards.items() if reward is not None and key in valid}
    if config.shuffle_rewards:
        order = sorted(known, key=shuffle_key)
        known = dict(zip(known, [known[key] for key in order], strict=True))
    enough = {key: reward for key, reward in known.items() if reward >= config.keep_reward}
    if config.keep == "gain":
        floors = {context: accuracy for context, accuracy in base.items() if accuracy is not None}
        kept = [key for key, reward in enough.items() if key[0] in floors and reward > floors[key[0]]]
    elif config.keep == "top":
        ranked = sorted(enough, key=lambda key: -enough[key])  # equal ones stay in the order of context and index
        kept = ranked[: round(config.keep_fraction * len(valid))]
    else:
        kept = best_of_each(enough)
    return [valid[key] for key in sorted(kept)]
