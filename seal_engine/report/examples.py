"""Self-edits to read: some contexts before and after, with their questions; and all of them by reward and context."""

import hashlib
from collections.abc import Sequence

from seal_engine.domains.knowledge.passages import Passage
from seal_engine.loop.records import EVALUATION, SelfEdit, Trial
from seal_engine.loop.restem import NO_ADAPTER, SELF_EDITS
from seal_engine.report.claim import seeds_said
from seal_engine.report.copied import mark_copied
from seal_engine.report.data import RunData
from seal_engine.report.html import cut, fold, preformatted, table_of
from seal_engine.report.self_edits import REJECTED, JudgedEdit, RoundRewards, is_right
from seal_engine.svg import clean

LONGEST = 2000  # characters of a text that are shown
LONGEST_ANSWER = 120
MOST_EDITS = 3000  # self-edits that are shown
MARKED = (
    "In self-edits, three or more words in a row as in the passage are <mark>marked</mark>; a single word of the "
    "passage that is neither common nor in its title is <u>underlined</u>."
)
# Hides, shows and orders what is on the page anyway.
SCRIPT = """
const filter = document.getElementById('filter');
if (filter) {
  filter.hidden = false;
  const value = name => filter.querySelector(`[name=${name}]`).value;
  filter.oninput = () => {
    const order = value('order'), words = value('words').toLowerCase();
    const least = Number(value('least') || 0), most = Number(value('most') || 100);
    for (const list of document.querySelectorAll('.edits')) {
      const reward = edit => Number(edit.dataset.reward);
      const edits = [...list.children].sort((a, b) => order === 'context'
        ? a.dataset.context.localeCompare(b.dataset.context) : (reward(a) - reward(b)) * (order === 'lowest' ? 1 : -1));
      for (const edit of edits) {
        edit.hidden = !edit.textContent.toLowerCase().includes(words) || reward(edit) < least || reward(edit) > most;
      }
      list.append(...edits);
      const shown = edits.filter(edit => !edit.hidden).length;
      list.parentElement.querySelector('.count').textContent = shown === edits.length ? '' : `, ${shown} shown`;
    }
  };
}
"""
FILTER = """<div id="filter" hidden>
<label>order <select name="order"><option value="highest">highest reward first</option>
<option value="lowest">lowest reward first</option><option value="context">by context</option></select></label>
<label>with the words <input name="words" type="search"></label>
<label>reward from <input name="least" type="number" min="0" max="100" placeholder="0"></label>
<label>to <input name="most" type="number" min="0" max="100" placeholder="100"> %</label>
</div>
"""


def examples(data: RunData) -> str:
    """Contexts that gained most, some in between, and those that gained least or lost most; else the first ones."""
    evaluated = sorted(data.by_round(SELF_EDITS))
    if not evaluated:
        return "<p>There are none until an evaluation is finished.</p>\n"
    if data.pairs is not None and data.pairs.changes:
        seed, shown, changes = data.pairs.seeds[0], [0, data.pairs.last], data.pairs.changes
        names, middle = list(changes), len(changes) // 2
        names = list(dict.fromkeys([*names[:2], *names[max(0, middle - 1) : middle + 1], *names[-2:]]))
        which = (
            "The two contexts that gained most over all seeds, two in the middle, and the two that gained least or "
            f"lost most. Texts and answers are those of seed {seed}."
        )
    else:
        shown = evaluated[:1]
        seed = min(data.by_round(SELF_EDITS)[shown[0]])
        phase = f"evaluation {shown[0]}"
        names, changes = list(dict.fromkeys(edit.context for edit in data.edits[seed, phase]))[:3], {}
        which = f"The first held-out contexts, {_when(shown[0])}, seed {seed}."
    marked = MARKED if data.contexts else ""
    cards = (_example(data, seed, name, shown, changes.get(name)) for name in names)
    return f"<p>{which} {marked}</p>\n" + "".join(cards)


def _when(round_number: int) -> str:
    return f"after round {round_number}" if round_number else "before any round"


def _example(data: RunData, seed: int, name: str, rounds: Sequence[int], change: float | None) -> str:
    """A context's passage, its self-edits side by side, and a line for each question."""
    passage = data.contexts.get(name)
    columns = [("no adapter", _first_trial(data, seed, NO_ADAPTER, name))]
    written = [] if passage is None else [f"<section><h4>Passage</h4>{_passage(passage)}</section>\n"]
    for number in rounds:
        trial = _first_trial(data, seed, f"evaluation {number}, {SELF_EDITS}", name)
        columns.append((_when(number), trial))
        edits = [edit for edit in data.edits[seed, f"{EVALUATION} {number}"] if edit.context == name]
        edit = next((edit for edit in edits if trial is None or edit.index == trial.index), None)
        body = "<p>Nothing was written.</p>" if edit is None else _written(edit, passage, trial)
        written.append(f"<section><h4>Self-edit {_when(number)}</h4>{body}</section>\n")
    gain = ""
    if change is not None and data.pairs is not None:
        gain = f" <small>{100 * change:+.1f} points, {seeds_said(data.pairs.seeds)}</small>"
    return (
        f'<article class="example"><h3>{clean(cut(name, 200))}{gain}</h3>\n'
        f'<div class="beside">\n{"".join(written)}</div>\n'
        f"{_answers(passage, [(title, trial) for title, trial in columns if trial is not None])}</article>\n"
    )


def _first_trial(data: RunData, seed: int, phase: str, context: str) -> Trial | None:
    return next((trial for trial in data.trials.get((seed, phase), ()) if trial.context == context), None)


def _passage(passage: Passage) -> str:
    return f'<div class="passage" dir="auto">{clean(cut(passage.context, LONGEST))}</div>'


def _written(edit: SelfEdit, passage: Passage | None, trial: Trial | None = None) -> str:
    """A self-edit's text, and what went wrong with it."""
    plain = cut(edit.text, LONGEST)
    shown = preformatted(edit.text, LONGEST)
    if passage is not None and plain.strip():
        shown = f'<pre dir="auto">{mark_copied(plain, passage.context, passage.title)}</pre>'
    if edit.rejected is not None:
        return f"{shown}<p>Rejected: {clean(cut(edit.rejected, 200))}</p>"
    if trial is not None and trial.error is not None:
        return f"{shown}<p>Could not be trained: {clean(cut(trial.error, 200))}</p>"
    return shown


def _answers(passage: Passage | None, columns: Sequence[tuple[str, Trial]]) -> str:
    """A line for each question: what is wanted, and what was answered."""
    num_questions = max((len(trial.grades) for _, trial in columns), default=0)
    if not num_questions:
        return ""
    asked = passage.questions if passage is not None and len(passage.questions) == num_questions else ()
    heads = ["question", "wanted answer"] if asked else ["question"]
    lines = []
    for i in range(num_questions):
        first = [clean(asked[i].question), clean(asked[i].answer)] if asked else [f"{i + 1}"]
        lines.append([*first, *(_answer(trial, i) for _, trial in columns)])
    return table_of([*heads, *(f"answer, {title}" for title, _ in columns)], lines, kind="answers")


def _answer(trial: Trial, i: int) -> str:
    """An answer with a sign of its grade. Of a puzzle the grade alone: it is of many answers together."""
    if i >= len(trial.grades):
        return "none"
    right = is_right(trial.grades[i])
    sign = {True: '<span class="right">✓</span>', False: '<span class="wrong">✗</span>', None: "no grade"}[right]
    if len(trial.answers) != len(trial.grades):
        return sign
    return f"{sign} {clean(cut(trial.answers[i].strip(), LONGEST_ANSWER))}"


def browser(groups: Sequence[RoundRewards], contexts: dict[str, Passage]) -> str:
    """All self-edits, a fold for each round or evaluation, the highest reward first; and the way there by context."""
    count = sum(len(group.edits) for group in groups)
    if not count:
        return "<p>Nothing has been written yet.</p>\n"
    left, shown = MOST_EDITS, []
    for group in groups:
        edits = sorted(group.edits, key=lambda one: -1.0 if one.reward is None else one.reward, reverse=True)[:left]
        left -= len(edits)
        items = "".join(_judged(edit, contexts.get(edit.edit.context)) for edit in edits)
        title = f'{group.title}: {len(edits)} self-edits<span class="count"></span>'
        shown.append(f'<details><summary>{title}</summary>\n<div class="edits">\n{items}</div>\n</details>\n')
    note = ""
    if count > MOST_EDITS:
        note = f'<p class="note">The first {MOST_EDITS:,} of {count:,} are on this page; the ledger has all.</p>\n'
    intro = f"<p>{count:,} self-edits, each with its reward, what it says and what its adapter answered. "
    intro += f"{MARKED if contexts else ''}</p>\n"
    return intro + FILTER + "".join(shown) + note + _by_context(groups, contexts)


def _place(context: str) -> str:
    """Where a context stands in the page."""
    return f"c{hashlib.sha256(context.encode('utf-8', 'replace')).hexdigest()[:12]}"


def _judged(judged: JudgedEdit, passage: Passage | None) -> str:
    """A self-edit in a fold, its reward and context in the line that is always seen."""
    edit, reward = judged.edit, judged.reward
    shown = "no reward" if reward is None else f"{reward:.0%}"
    title = f"<b>{shown}</b> {judged.status} · {clean(cut(edit.context, 80))} · seed {edit.seed}"
    trial = judged.trials[0] if judged.trials else None
    body = _written(edit, passage, trial)
    body += f'<p><a href="#{_place(edit.context)}">The context, and all its self-edits</a></p>\n'
    if judged.status != REJECTED and trial is not None and trial.error is None:
        several = f"first of {len(judged.trials)} adapters" if len(judged.trials) > 1 else "its adapter"
        body += _answers(passage, [(several, trial)])
    number = -1 if reward is None else round(100 * reward, 4)
    return (
        f'<details class="edit" data-reward="{number:g}" data-context="{clean(edit.context)}">'
        f'<summary>{title}</summary>\n<div id="{judged.anchor}">{body}</div>\n</details>\n'
    )


def _by_context(groups: Sequence[RoundRewards], contexts: dict[str, Passage]) -> str:
    """A fold for each context with its passage, and links to its self-edits."""
    found: dict[str, dict[str, list[JudgedEdit]]] = {}
    for group in groups:
        for edit in group.edits:
            found.setdefault(edit.edit.context, {}).setdefault(group.title, []).append(edit)
    folds = []
    for name, by_group in sorted(found.items()):
        lines = []
        for title, edits in by_group.items():
            rewards = ((edit, "no reward" if edit.reward is None else f"{edit.reward:.0%}") for edit in edits)
            links = " ".join(f'<a href="#{edit.anchor}">{shown}</a>' for edit, shown in rewards)
            lines.append(f"<p>{title}: {links}</p>\n")
        passage = _passage(contexts[name]) if name in contexts else ""
        folds.append(fold(cut(name, 200), f'<div id="{_place(name)}">{passage}{"".join(lines)}</div>'))
    return fold(f"By context: {len(folds)} contexts", "".join(folds))
