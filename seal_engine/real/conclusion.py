"""What a run of the demo comes to: whether the policy got better, and how its self-edits changed."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from seal_engine.domains.knowledge.grading import normalize
from seal_engine.domains.knowledge.seal_files import read_passages
from seal_engine.loop.inner import context_accuracies
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import EVALUATION, Phase, SelfEdit
from seal_engine.loop.restem import SELF_EDITS


def changes(ledger: Ledger) -> list[float]:
    """The change of accuracy of each passage from the first evaluation to the last, mean of all seeds, in points."""
    phases = [f"{phase}, {SELF_EDITS}" for phase in _evaluations(ledger)]
    before, after = (context_accuracies(ledger.trials(phase=phase)) for phase in phases)
    return [100 * (after[context] - before[context]) for context in before if context in after]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of at least two values, and its 95% interval."""
    mean, margin = fmean(values), 1.96 * stdev(values) / math.sqrt(len(values))
    return mean, mean - margin, mean + margin


def conclusion(ledger: Ledger) -> str:
    """The change of accuracy with its 95% interval over passages, and what the self-edits of both evaluations are like.
    "" where there is no round or only one passage."""
    last, by_passage = int(ledger.config["rounds"]), changes(ledger)
    if not last or len(by_passage) < 2:
        return ""
    mean, low, high = interval(by_passage)
    verdict = "the policy got better" if low > 0 else "the policy got worse" if high < 0 else "chance explains as much"
    control = "A control, rewards shuffled. " if ledger.config["shuffle_rewards"] else ""
    alone = (
        " This is one policy, and another seed's may come out otherwise." if len(ledger.config["seeds"]) == 1 else ""
    )
    texts = {p.title: p.context for p in read_passages(str(ledger.config["data"]))}
    then, now = (_describe(ledger.self_edits(phase=str(phase)), texts) for phase in _evaluations(ledger))
    return (
        f"{control}What the policy learned: its self-edits have {now} after round {last}, and had {then} before any. "
        f"Accuracy changed by {mean:+.1f} points (95% interval over {len(by_passage)} passages {low:+.1f} to "
        f"{high:+.1f}): {verdict}.{alone}"
    )


def _evaluations(ledger: Ledger) -> list[Phase]:
    """The first and the last."""
    return [Phase(EVALUATION, number) for number in (0, int(ledger.config["rounds"]))]


def _describe(edits: list[SelfEdit], texts: dict[str, str]) -> str:
    """The mean length of self-edits, and the share of their words that their passages have."""
    tokens = fmean(len(edit.token_ids) for edit in edits)
    shares = []
    for edit in edits:
        title = edit.context.removeprefix("held out ").partition(" ")[2]  # after the passage's number
        written, known = normalize(edit.text).split(), set(normalize(f"{title} {texts[title]}").split())
        shares.append(fmean(word in known for word in written) if written else 0.0)
    return f"{tokens:.0f} tokens ({100 * fmean(shares):.0f}% of the words are the passage's)"
