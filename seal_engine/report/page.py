"""A run as one page of HTML that needs nothing else: the finding first, then what it rests on.

What models wrote and what files said is untrusted: it reaches the page through svg.clean alone, which escapes it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from seal_engine.cluster.shares import read_workers
from seal_engine.domains.few_shot import puzzle_picture
from seal_engine.domains.few_shot.task import FewShotConfig
from seal_engine.files import replace_file
from seal_engine.loop.continual_results import read_result
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import EVALUATION, ROUND, Phase
from seal_engine.loop.restem import CONTINUED_PRETRAINING, SELF_EDITS
from seal_engine.report import plots
from seal_engine.report.claim import certainty, claim, is_over
from seal_engine.report.continual_page import continual_page
from seal_engine.report.continual_plots import draw_continual
from seal_engine.report.data import PARTS, RunData, finite, mean
from seal_engine.report.examples import SCRIPT, browser, examples
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
    rate,
    table,
)
from seal_engine.report.self_edits import KEPT, NOT_KEPT, REJECTED, RoundRewards, judged_rounds
from seal_engine.report.settings import environment_section, settings_section
from seal_engine.report.workers import workers_table
from seal_engine.runs import TASKS, Row, is_continual, rows
from seal_engine.svg import clean, standalone
from seal_engine.tiny.demo import BEST_STYLE
from seal_engine.types import is_number

PAGE = "report.html"
MOST = 20  # rows of a table that could be of any length
TERMS = {  # task's configuration -> what its self-edits are
    "knowledge": (
        "A <strong>self-edit</strong> is a text that the model writes about a passage, to be trained on. An "
        "<strong>adapter</strong> is a small set of extra weights (LoRA) that is trained on one self-edit and then "
        "asked the passage's questions without the passage; the share of right answers is the self-edit's reward. A "
        "<strong>round</strong> samples self-edits, rewards each of them, and trains the model to write as in those "
        "that are kept. The model that writes is the <strong>policy</strong>; a passage is a <strong>context</strong>."
    ),
    "few-shot": (
        "A <strong>self-edit</strong> is the model's choice of how to train on a puzzle's demonstrations. An "
        "<strong>adapter</strong> is a small set of extra weights (LoRA) that is trained in that way and then given "
        "the puzzle's test; whether it solves it is the self-edit's reward. A <strong>round</strong> samples "
        "self-edits, rewards each of them, and trains the model to choose as in those that are kept. The model that "
        "chooses is the <strong>policy</strong>; a puzzle is a <strong>context</strong>."
    ),
}


LOSSES = (
    '<p class="note">A line goes through the medians of all adapters of a round, or of the updates of all seeds; its '
    "band has 80% of them. It is dashed where not all seeds have ended the round. A loss that falls says that a text "
    "was learned, not that it was worth learning: that is what rewards are for.</p>\n"
)


def write_report(directory: Path) -> Path:
    """Write report.html, and an SVG of each picture, into a run's directory; returns the page. The run may go on.

    Equal directories give equal bytes. InputError where there is no run, or nothing can be written.
    """
    with Ledger.read(directory) as ledger:
        if is_continual(ledger):
            return _write_continual(directory, ledger)
        data = RunData(ledger)
        measured = rows(ledger)
    rounds = judged_rounds(data)
    pictures, puzzles = _draw(data, rounds), puzzle_picture.read_puzzles(directory / puzzle_picture.FILE)
    if puzzles:
        pictures["puzzles"] = puzzle_picture.draw(puzzles)
    for name, picture in pictures.items():
        replace_file(directory / f"{name}.svg", standalone(picture))
    # A model can write half a surrogate pair, which no file of text can hold.
    content = _page(data, measured, rounds, pictures).encode("utf-8", "replace")
    return replace_file(directory / PAGE, content)


def _write_continual(directory: Path, ledger: Ledger) -> Path:
    result = read_result(ledger)
    pictures = draw_continual(result.methods)
    for name, picture in pictures.items():
        replace_file(directory / f"{name}.svg", standalone(picture))
    page = continual_page(
        ledger, result, pictures, settings_section(ledger.config), workers_table(read_workers(directory))
    )
    return replace_file(directory / PAGE, page.encode("utf-8", "replace"))


def _draw(data: RunData, rounds: Sequence[RoundRewards]) -> dict[str, str]:
    """Name -> SVG of each picture for which there is something to show."""
    pictures: dict[str, str] = {}
    if data.accuracies:
        written = {method: data.by_round(method) for method in (SELF_EDITS, CONTINUED_PRETRAINING)}
        num_seeds = dict.fromkeys([*written, *data.baselines], data.num_seeds)
        pictures["accuracy"] = plots.accuracy(written, data.baselines, num_seeds)
    if data.pairs is not None and data.pairs.changes:
        pictures["contexts"] = plots.contexts(data.pairs)
    if any(one.rewarded for one in rounds):
        pictures["rewards"] = plots.rewards(rounds)
    if data.adapter_losses or data.policy_losses:
        pictures["losses"] = plots.losses(data.adapter_losses, data.policy_losses, data.unfinished_rounds)
    if any(sum(parts.values()) > 0 for parts in data.seconds_by_stage.values()):
        pictures["time"] = plots.time(data.seconds_by_stage, data.cpu_seconds_by_stage)
    return pictures


def _page(
    data: RunData,
    measured: Sequence[Row],
    rounds: Sequence[RoundRewards],
    pictures: dict[str, str],
) -> str:
    images = {name: figure(picture) for name, picture in pictures.items()}
    if "puzzles" in images:
        images["puzzles"] += '<p class="note">Of the first seed: some puzzles of each outcome.</p>\n'
    task = str(data.config.get("task", "run"))
    model = Path(str(data.config.get("model", ""))).name
    kind = "few-shot" if task in TASKS and TASKS[task].config is FewShotConfig else "knowledge"
    losses = images["losses"] + LOSSES if "losses" in images else "<p>No losses are recorded.</p>"
    title = claim(data, rounds)
    evaluations = judged_rounds(data, EVALUATION)
    sections = [
        _headline(data),
        f'<div class="beside">{images.get("accuracy", "")}<div>{_accuracy(data, measured)}</div></div>',
        f"<p>{TERMS[kind]}</p>",
        f"<h2>Examples</h2>\n{images.get('puzzles', '')}{examples(data)}",
        f"<h2>All self-edits</h2>\n{browser([*rounds, *evaluations], data.contexts)}",
        f"<h2>Rewards, and what was kept</h2>\n{images.get('rewards', '')}{_kept(data, rounds)}",
        f"<h2>Training losses</h2>\n{losses}",
        f"<h2>Held-out contexts, before and after</h2>\n{images.get('contexts', '')}{_contexts(data)}",
        f"<h2>Time and cost</h2>\n{images.get('time', '')}{_cost(data)}",
        f"<h2>Settings</h2>\n{settings_section(data.config)}",
        f"<h2>Environment</h2>\n{environment_section(data.environments)}",
    ]
    return document(", ".join(filter(None, [title, task, model])), sections, SCRIPT, heading=title)


def _headline(data: RunData) -> str:
    """What was run, whether it is over, and how sure the finding is."""
    task = str(data.config.get("task"))
    named = task if task in TASKS else f"{data.config.get('task') or 'not named'} (unknown to this version)"
    model = str(data.config.get("model") or "not named")
    lines = [f"Task: {clean(named)}. Model: {clean('/'.join(Path(model).parts[-2:]))}.", _what_was_asked(data)]
    if not data.steps:
        lines.append("The run has just begun: nothing has been finished yet.")
    else:
        if is_over(data):
            lines.append("The run is over.")
        elif data.done is not None:
            lines.append(
                f"<strong>The run is not over:</strong> {data.done[0]} of {data.done[1]} rounds and evaluations are "
                "done; a mean over fewer seeds than there will be is drawn as a ring, and losses of a round that has "
                "not ended are dashed."
            )
        lines.append(f"Last recorded: {clean(data.steps[-1].name)}, at {date(data.steps[-1].finished)}.")
    sure = certainty(data)
    lines = list(filter(None, lines))
    return (f'<p class="lead">{sure}</p>\n' if sure else "") + f'<p class="note">{" ".join(lines)}</p>'


def _what_was_asked(data: RunData) -> str:
    """How many contexts and questions there were; "" before the first trial."""
    contexts: dict[str, set[str]] = {ROUND: set(), EVALUATION: set()}
    for (_, phase), trials in data.trials.items():
        contexts.setdefault(Phase.parse(phase).stage, set()).update(trial.context for trial in trials)
    counts = sorted({len(trial.grades) for own in data.trials.values() for trial in own if trial.grades})
    if not counts or not contexts[EVALUATION]:
        return ""
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    learned = f"Rounds learn from {len(contexts[ROUND])} contexts. " if contexts[ROUND] else ""
    return f"{learned}Held out, to measure on: {len(contexts[EVALUATION])}. Questions on each: {each}."


def _accuracy(data: RunData, measured: Sequence[Row]) -> str:
    if not measured:
        return "<p>Nothing has been measured yet.</p>"
    seeds = data.num_seeds
    lines = [
        (
            row.name,
            *map(percent, (row.mean, row.deviation, row.standard_error)),
            str(len(row.accuracies)) if len(row.accuracies) >= seeds else f"{len(row.accuracies)} of {seeds}",
        )
        for row in measured
    ]
    note = (
        "Accuracy in percent, on held-out contexts: mean, standard deviation over seeds (sd), standard error over "
        "contexts (se). In the figure bars are one sd, small points single seeds."
    )
    if "passage in the prompt" in data.accuracies:
        note += (
            " No adapter: the model as it is, which has not seen the passages. Passage in the prompt: the same, with "
            "the passage to read. Passage only: an adapter trained on the passage itself."
        )
    if any(row.name.startswith("passage only, ") for row in measured):
        note += " Passage only, several times: an adapter trained on so many copies of it."
    if BEST_STYLE in data.accuracies:
        note += " Best style: on notes that a program writes, in the one of the miniature's styles that teaches best."
    return table(("method", "accuracy", "sd", "se", "seeds"), lines, (1, 2, 3, 4)) + f'<p class="note">{note}</p>\n'


def _contexts(data: RunData) -> str:
    pairs = data.pairs
    if pairs is None or not pairs.changes:
        return "<p>There is no evaluation after a round to compare with yet.</p>"
    note = "Where contexts have few questions, the change of a single one may be chance.</p>\n"
    lines = [
        (cut(name, 200), percent(pairs.before[name]), percent(pairs.after[name]), f"{100 * change:+.1f}")
        for name, change in pairs.changes.items()
    ]
    contexts = fold("All contexts", table(("context", "before", "after", "change"), lines, (1, 2, 3)))
    return f'<p>{certainty(data)}</p>\n<p class="note">{note}{contexts}'


def _kept(data: RunData, rounds: Sequence[RoundRewards]) -> str:
    parts = []
    if data.config.get("shuffle_rewards"):
        parts.append("<p>A control: self-edits were kept by shuffled rewards; the rewards shown are the real ones.</p>")
    for one in rounds:
        if one.rewarded and not any(edit.reward for edit in one.rewarded):
            parts.append(
                f"<p><strong>Round {one.number}: all rewards are 0.</strong> They tell no self-edit from another, so "
                "nothing could be learned from them. A keep_reward above 0 keeps none of them.</p>\n"
            )
    if rounds:
        heads = ("round", "self-edits", "rejected", "kept", "no adapter", "reward", "reward, kept", "tokens, kept",
                 "tokens, not kept")  # fmt: skip
        parts.append(table(heads, map(_round_line, rounds), range(9)))
        parts.append(
            '<p class="note">Over all seeds: mean accuracy and rewards in percent, median tokens. A reward is the mean '
            f"accuracy of the adapters trained on a self-edit; rejected ones have none. {_rule(data)}</p>\n"
        )
    else:
        parts.append("<p>No round has been finished.</p>")
    if data.policies:
        lines = [
            (str(p.seed), str(p.round), str(len(p.kept)), str(p.num_steps), number(p.final_loss), duration(p.seconds))
            for p in data.policies
        ]
        heads = ("seed", "round", "trained on", "steps", "last loss", "time")
        parts.append(fold("Policy updates", table(heads, lines, range(6))))
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


def _rule(data: RunData) -> str:
    """Which self-edits are kept, by the run's settings; "" where these are not known."""
    keep, share, least = (data.config.get(name) for name in ("keep", "keep_fraction", "keep_reward"))
    if not is_number(share) or not is_number(least):
        return ""
    what = {
        "top": f"the {share:.0%} with the highest rewards",
        "best": "the one with the highest reward of each context",
        "gain": "those with a reward above the accuracy without an adapter",
    }.get(str(keep))
    return "" if what is None else f"Kept, of each seed: {what}, if it is at least {least:.0%}."


def _round_line(one: RoundRewards) -> tuple[str, ...]:
    """A round's line in the table."""
    kept = one.with_status(KEPT)
    tokens = [[len(judged.edit.token_ids) for judged in own] for own in (kept, one.with_status(NOT_KEPT))]
    counts = (one.number, len(one.edits), len(one.with_status(REJECTED)), len(kept))
    rewards = (one.base, one.mean, mean(judged.reward for judged in kept))
    return (*map(str, counts), *map(percent, rewards), *(f"{median(own):g}" if own else NONE for own in tokens))


def _cpu_time(data: RunData) -> str:
    """Of the whole run, and how many cores that is."""
    wall, cpu = sum(step.seconds for step in data.steps), [step.cpu_seconds for step in data.steps]
    if None in cpu or not wall:
        return "not recorded"
    own = sum(finite(cpu))
    return f"{duration(own)} in this process: {own / wall:.2g} cores at work on average"


def _cost(data: RunData) -> str:
    if not data.steps:
        return "<p>Nothing has been finished yet.</p>"
    adapters, edits = data.adapters, [edit for own in data.edits.values() for edit in own]
    trials = [trial for own in data.trials.values() for trial in own]
    asking = sum(trial.seconds for trial in trials if trial.num_steps)
    tokens = sum(adapter.num_tokens for adapter in adapters)
    written = sum(len(edit.token_ids) for edit in edits)
    updates = sum(policy.path is not None for policy in data.policies)
    facts = [
        ("begun", date(data.started)),
        ("last recorded", date(data.steps[-1].finished)),
        ("time at work", duration(sum(step.seconds for step in data.steps))),
        ("CPU time", _cpu_time(data)),
        ("adapters trained", f"{len(adapters):,}, and {updates} policy updates"),
        ("tokens trained on", f"{tokens:,} by adapters, all epochs together"),
        ("tokens written", f"{written:,} in {len(edits):,} self-edits, those of baselines too"),
        ("adapters per second, asking and grading included", rate(len(adapters), asking)),
        ("tokens trained on per second, the same time", rate(tokens, asking)),
    ]
    stages = data.seconds_by_stage
    lines = [(stage, [own[part] for part in PARTS]) for stage, own in stages.items()]
    sums = [sum(own[part] for own in stages.values()) for part in PARTS]
    cpu = data.cpu_seconds_by_stage
    cpu["all"] = None if None in cpu.values() else sum(finite(cpu.values()))
    by_stage = [
        [name, *map(duration, own), duration(sum(own)), NONE if cpu[name] is None else duration(cpu[name] or 0.0)]
        for name, own in [*lines, ("all", sums)]
    ]
    if sum(sums) > 0:
        by_stage.append(["share", *(f"{100 * value / sum(sums):.0f}%" for value in (*sums, sum(sums))), ""])
    cost = [
        (name, f"{len(own):,}", number(mean(t.seconds for t in own)), number(mean(float(t.num_tokens) for t in own)))
        for name, own in (
            ("trained and asked", [t for t in trials if t.num_steps]),
            ("asked without an adapter", [t for t in trials if not t.num_steps and t.error is None]),
        )
    ]
    note = (
        "Over all seeds; what was lost to interruptions does not count. Where CPU time is less than in like "
        "stages, others had the machine's cores, or the run waited."
    )
    if len([trial for trial in trials if trial.num_steps]) > len(adapters):
        note += (
            " Trials with the same self-edit and seed share an adapter, so that there are more trials than adapters."
        )
    tables = table(("stage", *PARTS, "all", "CPU time"), by_stage, range(1, len(PARTS) + 3))
    tables += table(("trials", "count", "seconds each", "tokens trained on, each"), cost, (1, 2, 3))
    shown = table(("", ""), facts) + fold("By stage", tables) + f'<p class="note">{note}</p>\n'
    return shown + workers_table(data.workers)
