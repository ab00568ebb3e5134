"""What a run of the demo comes to, in words: whether rewards improved the policy, and how its self-edits changed."""

import math
from statistics import fmean, stdev

from seal_engine.domains.knowledge.grading import normalize
from seal_engine.domains.knowledge.seal_files import read_passages
from seal_engine.loop.inner import context_accuracies
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import EVALUATION, Phase, SelfEdit
from seal_engine.loop.restem import SELF_EDITS


def conclusion(ledger: Ledger) -> str:
    """The change of accuracy from the first evaluation to the last, with its 95% interval over passages (each the mean
    of all seeds), and what the self-edits of both are like. "" where there is no round or only one passage."""
    last = int(ledger.config["rounds"])
    phases = [Phase(EVALUATION, number) for number in (0, last)]
    before, after = (context_accuracies(ledger.trials(phase=f"{phase}, {SELF_EDITS}")) for phase in phases)
    changes = [100 * (after[context] - before[context]) for context in before if context in after]
    if not last or len(changes) < 2:
        return ""
    mean, margin = fmean(changes), 1.96 * stdev(changes) / math.sqrt(len(changes))
    verdict = "the policy got better" if mean > margin else "chance explains as much"
    verdict = "the policy got worse" if mean < -margin else verdict
    control = "A control, rewards shuffled. " if ledger.config["shuffle_rewards"] else ""
    texts = {p.title: p.context for p in read_passages(str(ledger.config["data"]))}
    then, now = (_describe(ledger.self_edits(phase=str(phase)), texts) for phase in phases)
    return (
        f"{control}What the policy learned: its self-edits have {now} after round {last}, and had {then} before any. "
        f"Accuracy changed by {mean:+.1f} points (95% interval over {len(changes)} passages {mean - margin:+.1f} to "
        f"{mean + margin:+.1f}): {verdict}."
    )


def _describe(edits: list[SelfEdit], texts: dict[str, str]) -> str:
    """The mean length of self-edits, and the share of their words that their passages have."""
    tokens = fmean(len(edit.token_ids) for edit in edits)
    shares = []
    for edit in edits:
        title = edit.context.removeprefix("held out ").partition(" ")[2]  # after the passage's number
        written, known = normalize(edit.text).split(), set(normalize(f"{title} {texts[title]}").split())
        shares.append(fmean(word in known for word in written) if written else 0.0)
    return f"{tokens:.0f} tokens ({100 * fmean(shares):.0f}% of the words are the passage's)"
