"""The page of the continual experiment."""

from collections.abc import Mapping

from seal_engine.loop.continual_results import PROBES, ContinualResult, interval
from seal_engine.loop.ledger import Ledger
from seal_engine.report.html import NONE, date, document, duration, figure, number, percent, table
from seal_engine.svg import clean

TERMS = (
    "An <strong>edit</strong> teaches the model one passage, by training on a self-edit: a text that the model has "
    "written about it. Edits come one after another, and after each of them all passages so far are asked about again. "
    "A <strong>method</strong> is a way to learn an edit without losing those before."
)
CAPTIONS = {
    "forgetting": "Row 0 is the untrained model. A column is a passage, learned in the row of its number.",
    "age": "",
    "cost": "What is merged or trained in place takes no room of its own.",
}


def continual_page(
    ledger: Ledger, result: ContinualResult, pictures: Mapping[str, str], settings: str, workers: str = ""
) -> str:
    """The page as HTML. settings: its last section. workers: a table of who did how much."""
    shown = {name: figure(pictures[name], caption) for name, caption in CAPTIONS.items() if name in pictures}
    facts = [
        ("began", date(ledger.started)),
        ("sequences and passages", f"{result.sequences} x {result.passages}, {len(ledger.config['seeds'])} seeds"),
        ("adapters trained", f"{result.adapters:,}"),
    ]
    return document(
        continual_claim(result),
        [
            f"<p>{TERMS}</p>",
            shown.pop("forgetting", ""),
            "<h2>What is learned and what is kept</h2>\n" + _measures(result),
            "".join(shown.values()),
            "<h2>What else has changed</h2>\n" + _probes(result),
            "<h2>Run</h2>\n" + table(("", ""), facts) + _times(result) + workers,
            "<h2>Settings</h2>\n" + settings,
        ],
    )


def continual_claim(result: ContinualResult) -> str:
    """The finding: the method that keeps most, beside merging each edit into the model."""
    kept = {method.name: method.kept for method in result.methods if method.kept is not None}
    if not kept:
        return "One edit after another: nothing has been measured yet"
    best = max(kept, key=lambda name: kept[name])
    merge = f", merge {kept['merge']:.0%}" if best != "merge" and "merge" in kept else ""
    return f"After {result.passages} edits {best} keeps {kept[best]:.0%}{merge}"


def _times(result: ContinualResult) -> str:
    """Wall time and CPU time of each part of the steps, and of the whole run."""
    cpu = {name: NONE if own is None else duration(own) for name, own in result.cpu_seconds.items()}
    lines = [(name, duration(seconds), cpu.get(name, NONE)) for name, seconds in result.seconds.items()]
    note = (
        "CPU time is this process's, over all its threads. Everything: also writing, probes, and what the untrained "
        "model was asked."
    )
    return table(("time", "wall", "CPU"), lines, (1, 2)) + f'<p class="note">{note}</p>\n'


def _measures(result: ContinualResult) -> str:
    lines = [
        (
            m.name,
            *map(percent, (m.learned, m.kept, m.transfer)),
            interval(m.over_merge),
            interval(m.over_joint),
            f"{m.tokens:,}",
        )
        for m in result.methods
    ]
    base = percent(result.untrained["accuracy"])
    note = (
        f"In percent; the untrained model has {base}. Learned: just after each edit. Kept: all passages after the last "
        "edit. Transfer: change from the one to the other. Differences in the last column but one: of what is kept, in "
        "points, with the 95% interval of a bootstrap over pairs of sequences."
    )
    heads = ("method", "learned", "kept", "transfer", "over merge", "over joint", "tokens trained")
    return table(heads, lines, range(1, 7)) + f'<p class="note">{clean(note)}</p>\n'


def _probes(result: ContinualResult) -> str:
    lines = [("untrained", *(percent(result.untrained[p]) for p in PROBES), "0", NONE)]
    for m in result.methods:
        routing = ", ".join(f"{kind} {percent(share)}" for kind, share in m.routing.items())
        lines.append((m.name, *(percent(m.probes[p]) for p in PROBES), number(m.kl), routing or NONE))
    note = (
        "In percent. Reading: questions about other passages with the passage in the prompt. Knew: questions of no "
        "passage. Writing: reward of self-edits written after the last edit. KL: from the untrained model, nats per "
        "token, on its own texts."
    )
    heads = ("method", "reading", "knew", "writing", "KL", "routing")
    return table(heads, lines, (1, 2, 3, 4)) + f'<p class="note">{clean(note)}</p>\n'
