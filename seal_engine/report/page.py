"""A run as one page of HTML that needs nothing else, with pictures where matplotlib is installed.

What models wrote and what files said is untrusted: it reaches the page through report_html alone, which escapes it.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from seal_engine.domains.few_shot.puzzle_picture import saved
from seal_engine.files import replace_file
from seal_engine.loop.continual_results import read_result
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.restem import CONTINUED_PRETRAINING, SELF_EDITS
from seal_engine.loop.settings import defaults_of
from seal_engine.report.continual_page import continual_page, continual_pictures
from seal_engine.report.data import PARTS, RunData, deviation, mean
from seal_engine.report.html import (
    NONE,
    cut,
    date,
    document,
    duration,
    figure,
    fold,
    number,
    percent,
    preformatted,
    rate,
    table,
    text,
)
from seal_engine.runs import TASKS, Row, configs, is_continual, rows

PAGE = "report.html"
LONGEST = 2000  # characters of a self-edit that are shown
MOST = 20  # rows of a table that could be of any length
NO_PICTURES = "There are no pictures, as matplotlib is not installed: <code>pip install 'seal-engine[plot]'</code>"
ABOUT = {  # picture -> in words, and what is below it
    "accuracy": ("Accuracy on held-out contexts by round, and of the baselines.", ""),
    "contexts": (
        "Accuracy of each held-out context before any round and after the last one.",
        "Each line is a context: a ring before, a dot after.",
    ),
    "kept": (
        "Histograms of rewards and lengths of self-edits by round.",
        "A reward is the mean accuracy of the adapters trained on a self-edit. Rejected self-edits have none.",
    ),
    "time": ("Time by stage and part.", "Shares are of the whole run."),
    "puzzles": (
        "Held-out puzzles with the answers before and after.",
        "Puzzles of the first seed: those gained, solved all along, never solved and lost, some of each.",
    ),
}


def write_report(directory: Path) -> Path:
    """Write report.html, and a PNG of each picture, into a run's directory; returns the page. The run may go on.

    Equal ledgers give equal bytes. InputError where there is no run, or nothing can be written.
    """
    with Ledger.read(directory) as ledger:
        if is_continual(ledger):
            return _write_continual(directory, ledger)
        data = RunData(ledger)
        measured = rows(ledger)
    pictures = _draw(data)
    for name, picture in (pictures or {}).items():
        replace_file(directory / f"{name}.png", picture)
    puzzles = saved(directory)
    if pictures is not None and puzzles is not None:
        pictures["puzzles"] = puzzles
    # A model can write half a surrogate pair, which no file of text can hold.
    content = _page(data, measured, pictures).encode("utf-8", "replace")
    return replace_file(directory / PAGE, content)


def _write_continual(directory: Path, ledger: Ledger) -> Path:
    result = read_result(ledger)
    pictures = continual_pictures(result)
    for name, picture in (pictures or {}).items():
        replace_file(directory / f"{name}.png", picture)
    page = continual_page(ledger, result, pictures, _settings(ledger.config))
    return replace_file(directory / PAGE, page.encode("utf-8", "replace"))


def _draw(data: RunData) -> dict[str, bytes] | None:
    """The pictures; None without matplotlib."""
    try:
        from seal_engine.report.plots import draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        return None
    written = {
        m: {r: list(found.values()) for r, found in data.by_round(m).items()}
        for m in (SELF_EDITS, CONTINUED_PRETRAINING)
    }
    return draw(written, data.baselines, data.pairs, data.rounds, data.seconds_by_stage)


def _page(data: RunData, measured: Sequence[Row], pictures: Mapping[str, bytes] | None) -> str:
    images = {name: figure(picture, *ABOUT[name]) for name, picture in (pictures or {}).items()}
    model = Path(str(data.config.get("model", ""))).name
    title = ", ".join(filter(None, [str(data.config.get("task", "run")), model]))
    return document(
        title,
        [
            _headline(data),
            "" if pictures is not None else f"<p>{NO_PICTURES}</p>",
            f"<h2>What was run</h2>\n{_what_was_run(data)}",
            f"<h2>Accuracy</h2>\n{_accuracy(measured)}{images.get('accuracy', '')}",
            f"<h2>Held-out contexts, before and after</h2>\n{images.get('contexts', '')}{_contexts(data)}",
            f"<h2>What was kept</h2>\n{images.get('kept', '')}{_kept(data)}",
            f"<h2>Examples</h2>\n{images.get('puzzles', '')}{_examples(data)}",
            f"<h2>Time and cost</h2>\n{images.get('time', '')}{_cost(data)}",
        ],
    )


def _headline(data: RunData) -> str:
    """Whether the run is over, and what it came to."""
    lines = []
    if not data.steps:
        lines.append("The run has just begun: nothing has been finished yet.")
    else:
        last = data.steps[-1]
        if data.done is not None and data.done[0] == data.done[1]:
            lines.append("The run is over.")
        elif data.done is not None:
            lines.append(f"The run is not over: {data.done[0]} of {data.done[1]} rounds and evaluations are done.")
        lines.append(f"Last recorded: {text(last.name)}, at {date(last.finished)}.")
    if data.pairs is not None:
        by_round, seeds = data.by_round(SELF_EDITS), data.pairs.seeds
        before, after = (fmean(by_round[r][seed] for seed in seeds) for r in (0, data.pairs.last))
        lines.append(
            f"Self-edits on held-out contexts, {_seeds(seeds)}: <strong>{percent(before)}%</strong> before any round, "
            f"<strong>{percent(after)}%</strong> after round {data.pairs.last}."
        )
    return f"<p>{' '.join(lines)}</p>"


def _what_was_run(data: RunData) -> str:
    config, task = data.config, data.config.get("task")
    adapters, edits = data.adapters, [edit for own in data.edits.values() for edit in own]
    asking = sum(trial.seconds for own in data.trials.values() for trial in own if trial.num_steps)
    tokens = sum(adapter.num_tokens for adapter in adapters)
    updates = sum(policy.path is not None for policy in data.policies)
    facts = [
        ("task", str(task) if task in TASKS else f"{task or 'not named'} (unknown to this version)"),
        ("model", str(config.get("model") or "not named")),
        ("seeds", ", ".join(map(str, config["seeds"])) if isinstance(config.get("seeds"), list) else "not named"),
        ("begun", date(data.started)),
        ("last recorded", date(data.steps[-1].finished) if data.steps else "nothing"),
        ("time at work", duration(sum(step.seconds for step in data.steps))),
        ("adapters trained", f"{len(adapters):,}, and {updates} policy updates"),
        ("tokens trained on", f"{tokens:,} by adapters, all epochs together"),
        ("tokens written", f"{sum(len(edit.token_ids) for edit in edits):,} in {len(edits):,} self-edits"),
        ("adapters a second, with asking and grading", rate(len(adapters), asking)),
        ("tokens trained on a second, with the same", rate(tokens, asking)),
    ]
    return table(("", ""), facts) + _settings(config)


def _settings(config: Mapping[str, Any]) -> str:
    """Those that differ from the task's defaults, and all others in a fold."""
    known: dict[str, Any] = {}
    if config.get("task") in TASKS:
        for kind in configs(config["task"]):
            known |= defaults_of(kind)
        known |= TASKS[config["task"]].defaults
    known = json.loads(json.dumps(known))  # as settings come back from a ledger: tuples are lists
    names = sorted(config.keys() - {"task", "sha256"})
    own = [name for name in names if name not in known or known[name] != config[name]]
    rest = [name for name in names if name not in own]
    parts = []
    if own:
        lines = [(name, _shown(config[name]), _shown(known[name]) if name in known else NONE) for name in own]
        parts.append("<h3>Settings that differ from the defaults</h3>\n")
        parts.append(table(("setting", "here", "default"), lines))
    if rest:
        lines = [(name, _shown(config[name])) for name in rest]
        parts.append(fold("All other settings, at their defaults", table(("setting", "value"), lines)))
    if isinstance(config.get("sha256"), dict) and config["sha256"]:
        lines = [(name, _shown(digest)) for name, digest in sorted(config["sha256"].items())]
        parts.append(fold("Files that were read", table(("setting", "sha256"), lines)))
    return "".join(parts)


def _accuracy(measured: Sequence[Row]) -> str:
    if not measured:
        return "<p>Nothing has been measured yet.</p>"
    lines = [
        (row.name, *map(percent, (row.mean, row.deviation, row.standard_error)), str(len(row.accuracies)))
        for row in measured
    ]
    note = (
        "In percent, on held-out contexts: mean, standard deviation over seeds (sd), standard error over contexts (se)."
    )
    return table(("method", "accuracy", "sd", "se", "seeds"), lines, (1, 2, 3, 4)) + f'<p class="note">{note}</p>\n'


def _contexts(data: RunData) -> str:
    pairs = data.pairs
    if pairs is None or not pairs.changes:
        return "<p>There is no evaluation after a round to compare with yet.</p>"
    changes = list(pairs.changes.values())
    sd = deviation(changes)
    error = "" if sd is None else f" (standard error over contexts: {percent(sd / math.sqrt(len(changes)))})"
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    summary = (
        f"<p>{len(changes)} contexts, {_seeds(pairs.seeds)}: {better} better, {worse} worse, "
        f"{len(changes) - better - worse} the same; mean change {100 * fmean(changes):+.1f} points{error}. "
        "Where contexts have few questions, the change of a single one may be chance.</p>\n"
    )
    if pairs.missing:
        summary += f"<p>{pairs.missing} contexts are left out, as they lack an accuracy before or after.</p>\n"
    lines = [
        (cut(name, 200), percent(pairs.before[name]), percent(pairs.after[name]), f"{100 * change:+.1f}")
        for name, change in pairs.changes.items()
    ]
    return summary + fold("All contexts", table(("context", "before", "after", "change"), lines, (1, 2, 3)))


def _kept(data: RunData) -> str:
    parts = []
    if data.config.get("shuffle_rewards"):
        parts.append("<p>A control: self-edits were kept by shuffled rewards; the rewards shown are the real ones.</p>")
    if data.rounds:
        lines = []
        for one in data.rounds:
            kept, others = len(one.kept_tokens), len(one.other_tokens)
            lengths = (f"{median(own):g}" if own else NONE for own in (one.kept_tokens, one.other_tokens))
            rewards = (mean(own) for own in (one.base, one.kept_rewards + one.other_rewards, one.kept_rewards))
            counts = (one.number, kept + others + one.rejected, one.rejected, kept)
            lines.append((*map(str, counts), *map(percent, rewards), *lengths))
        heads = (
            "round",
            "self-edits",
            "rejected",
            "kept",
            "no adapter",
            "reward",
            "reward, kept",
            "tokens, kept",
            "tokens, not kept",
        )
        parts.append(table(heads, lines, range(9)))
        parts.append('<p class="note">Over all seeds: mean accuracy and rewards in percent, median tokens.</p>\n')
        lines = [
            (str(p.seed), str(p.round), str(len(p.kept)), str(p.num_steps), number(p.final_loss), duration(p.seconds))
            for p in data.policies
        ]
        heads = ("seed", "round", "trained on", "steps", "last loss", "time")
        parts.append(fold("Policy updates", table(heads, lines, range(6))))
    else:
        parts.append("<p>No round has been finished.</p>")
    failures = {reason: Counter({"": count}) for reason, count in data.failures.most_common()}
    for title, counts in (("Rejected self-edits", data.rejections), ("Trials that failed", failures)):
        if counts:
            lines = [
                (cut(reason, 200), str(own.total()), "; ".join(f"{phase}: {n}" for phase, n in own.items() if phase))
                for reason, own in list(counts.items())[:MOST]
            ]
            parts.append(f"<h3>{title}</h3>\n{table(('reason', 'count', 'where'), lines, (1,))}")
            if len(counts) > MOST:
                parts.append(f'<p class="note">And {len(counts) - MOST} rarer reasons.</p>')
    return "".join(parts)


def _examples(data: RunData) -> str:
    """Self-edits of some contexts before and after, side by side: those that changed most, and some in between."""
    if data.pairs is None or not data.pairs.changes:
        return "<p>There are none until an evaluation after a round is finished.</p>"
    seed, last, changes = data.pairs.seeds[0], data.pairs.last, data.pairs.changes
    names, middle = list(changes), len(changes) // 2
    parts = [
        "<p>The two contexts that gained most over all seeds, two in the middle, and the two that gained least or lost "
        f"most. Texts are those of seed {seed}; answers are in the order of the context's questions.</p>\n"
    ]
    for name in dict.fromkeys([*names[:2], *names[max(0, middle - 1) : middle + 1], *names[-2:]]):
        cells = "".join(f"<td>{_example(data, seed, f'evaluation {r}', name)}</td>" for r in (0, last))
        parts.append(
            f"<h3>{text(cut(name, 200))} <small>({100 * changes[name]:+.1f} points)</small></h3>\n"
            f'<table class="pair">\n<thead><tr><th>before any round</th><th>after round {last}</th></tr></thead>\n'
            f"<tbody><tr>{cells}</tr></tbody>\n</table>\n"
        )
    return "".join(parts)


def _example(data: RunData, seed: int, phase: str, context: str) -> str:
    """The first self-edit that was trained on, and what its first adapter answered."""
    edits = {edit.index: edit for edit in data.edits[seed, phase] if edit.context == context}
    trial = next((t for t in data.trials[seed, f"{phase}, {SELF_EDITS}"] if t.context == context), None)
    if trial is None:
        rejected = [f"<p>Rejected: {text(cut(e.rejected or '', 200))}</p>{_written(e.text)}" for e in edits.values()]
        return rejected[0] if rejected else "<p>Nothing was written.</p>"
    edit = edits.get(trial.index)
    written = "" if edit is None else f'<p class="note">{len(edit.token_ids)} tokens</p>{_written(edit.text)}'
    if trial.error is not None:
        return f"{written}<p>Could not be trained: {text(cut(trial.error, 200))}</p>"
    answers = "".join(
        f"<li><strong>{_grade(grade)}</strong> {text(cut(answer, 300))}</li>\n"
        for answer, grade in zip(trial.answers, trial.grades, strict=False)
    )
    return f"{written}<ol>\n{answers}</ol>"


def _cost(data: RunData) -> str:
    if not data.steps:
        return "<p>Nothing has been finished yet.</p>"
    stages = data.seconds_by_stage
    lines = [(stage, [own[part] for part in PARTS]) for stage, own in stages.items()]
    sums = [sum(own[part] for own in stages.values()) for part in PARTS]
    shown = [[name, *map(duration, own), duration(sum(own))] for name, own in [*lines, ("all", sums)]]
    if sum(sums) > 0:
        shown.append(["share", *(f"{100 * value / sum(sums):.0f}%" for value in (*sums, sum(sums)))])
    parts = [table(("stage", *PARTS, "all"), shown, range(1, len(PARTS) + 2))]
    trials = [trial for own in data.trials.values() for trial in own]
    cost = [
        (name, f"{len(own):,}", number(mean(t.seconds for t in own)), number(mean(float(t.num_tokens) for t in own)))
        for name, own in (
            ("trained and asked", [t for t in trials if t.num_steps]),
            ("asked without an adapter", [t for t in trials if not t.num_steps and t.error is None]),
        )
    ]
    parts.append(table(("trials", "count", "seconds each", "tokens trained on, each"), cost, (1, 2, 3)))
    note = (
        "Over all seeds. The time of work that an interruption undid is not in it. Trials with the same self-edit and "
        "seed share an adapter, so that there are more trials than adapters."
    )
    return "".join(parts) + f'<p class="note">{note}</p>\n'


def _written(plain: str) -> str:
    return preformatted(plain, LONGEST)


def _shown(value: Any) -> str:
    """A setting's value: text that can be seen as it is, all else as JSON."""
    plain = isinstance(value, str) and value.isprintable() and value.strip() == value != ""
    return cut(value if plain else json.dumps(value, ensure_ascii=False), 300)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]} alone" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"


def _grade(grade: float | None) -> str:
    if grade is None or not math.isfinite(grade):
        return "no grade"
    return {0.0: "✗ 0", 1.0: "✓ 1"}.get(grade, f"{grade:.2g}")
