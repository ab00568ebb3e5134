"""What a round of self-edits came to: who was asked what, who was right, and the statistics and choices that follow.

A result holds, for each passage ("article") and self-edit ("completion"), what was answered in each repeat ("rep") with
the adapter and without (the "baseline"). Statistics follow from the grades, as in the published files:

- a repeat's accuracy is the share of right answers, rounded to 4 digits, and its gain is the difference of the two
  accuracies, rounded too;
- a completion's are means and sample standard deviations over its repeats, not rounded;
- an article's are means over its completions, and the standard deviation of their means, rounded to 4 digits;
- the overall ones are made from articles before that rounding; the mean spread within completions is over all
  completions of all articles; the gain is the difference of the two means.

The standard deviation of one number is 0. An ungraded answer is left out of every mean, out of a gain also where only
the other side is graded, and counted under "ungraded", a key that is there only where it counts something. A statistic
of nothing is null.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean, stdev
from typing import Any

from seal_engine.loop.selection import DIGITS, best_of_each
from seal_engine.types import require

Stats = dict[str, float | None]


@dataclass(frozen=True)
class Asked:
    """One question in one repeat. Grades are a grader's 1.0, 0.0 or None (ungraded), or booleans."""

    rep: int
    question: str
    answer: str  # the right one
    baseline_answer: str
    adapter_answer: str
    baseline_correct: float | None
    adapter_correct: float | None

    def __post_init__(self):
        for name in ("baseline_correct", "adapter_correct"):
            grade = getattr(self, name)
            require(grade is None or grade in (0, 1), name, grade, "True, False, 1.0, 0.0 or None")
            object.__setattr__(self, name, None if grade is None else bool(grade))


@dataclass(frozen=True)
class Judged:
    """A completion, and how its adapters answered."""

    text: str
    questions: tuple[Asked, ...]


@dataclass(frozen=True)
class Article:
    """A passage, its completions, and what they were sampled from."""

    title: str
    context: str
    completions: tuple[Judged, ...]
    prompt: str = ""


@dataclass(frozen=True)
class Result:
    """A round of trained and questioned self-edits."""

    articles: tuple[Article, ...]
    timestamp: str  # month, day, _, hour, minute, second: 0508_015401
    model: str
    dataset: str
    split_newlines: bool
    k_completions: int  # of each article
    eval_times: int  # repeats of each completion
    lora_params: Mapping[str, Any]  # rank, alpha, dropout, epochs, lr, batch_size, grad_accum_steps


def completion_stats(questions: Sequence[Asked]) -> Stats:
    """A completion's statistics from its grades."""
    graded = [one for one in questions if None not in (one.baseline_correct, one.adapter_correct)]
    baseline = [round(share, DIGITS) for share in _shares(questions, "baseline_correct")]
    adapter = [round(share, DIGITS) for share in _shares(questions, "adapter_correct")]
    pairs = zip(_shares(graded, "adapter_correct"), _shares(graded, "baseline_correct"), strict=True)
    stats = {
        "baseline_mean": _mean(baseline),
        "baseline_std": _deviation(baseline),
        "adapter_mean": _mean(adapter),
        "adapter_std": _deviation(adapter),
        "gain_mean": _mean([round(after - before, DIGITS) for after, before in pairs]),
    }
    grades = chain.from_iterable((one.baseline_correct, one.adapter_correct) for one in questions)
    return _count(stats, sum(grade is None for grade in grades))


def article_stats(completions: Sequence[Stats]) -> Stats:
    """An article's statistics from those of its completions, not rounded."""
    means = _known(completions, "adapter_mean")
    stats = {
        "baseline_accuracy": _mean(_known(completions, "baseline_mean")),
        "adapter_mean_accuracy": _mean(means),
        "adapter_std_over_completions": _deviation(means),
        "mean_adapter_std_within_completions": _mean(_known(completions, "adapter_std")),
        "mean_gain": _mean(_known(completions, "gain_mean")),
    }
    return _count(stats, sum(one.get("ungraded") or 0 for one in completions))


def overall_stats(articles: Sequence[Sequence[Stats]]) -> Stats:
    """The statistics of all articles from those of each one's completions, not rounded."""
    made = [article_stats(completions) for completions in articles]
    before, after = _known(made, "baseline_accuracy"), _known(made, "adapter_mean_accuracy")
    stats = {
        "baseline_mean_accuracy": _mean(before),
        "baseline_std_of_article_means": _deviation(before),
        "adapter_mean_accuracy": _mean(after),
        "adapter_std_of_article_means": _deviation(after),
        "mean_adapter_std_over_completions": _mean(_known(made, "adapter_std_over_completions")),
        "mean_adapter_std_within_completions": _mean(_known(chain.from_iterable(articles), "adapter_std")),
        "mean_gain": mean(after) - mean(before) if before and after else None,
    }
    return _count(stats, sum(one.get("ungraded") or 0 for one in made))


def _shares(questions: Sequence[Asked], name: str) -> list[float]:
    """Of each repeat with a grade, the share of grades that are right."""
    by_rep: dict[int, list[bool]] = {}
    for one in questions:
        if getattr(one, name) is not None:
            by_rep.setdefault(one.rep, []).append(getattr(one, name))
    return [sum(grades) / len(grades) for grades in by_rep.values()]


def _known(stats: Iterable[Stats], name: str) -> list[float]:
    return [value for one in stats if (value := one[name]) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else 0.0 if values else None


def _count(stats: Stats, ungraded: float) -> Stats:
    return {**stats, "ungraded": ungraded} if ungraded else stats


def rounded(stats: Stats) -> Stats:
    """To the digits of published files."""
    return {name: None if value is None else round(value, DIGITS) for name, value in stats.items()}


def select(result: Result) -> list[dict[str, str]]:
    """Of each article, its prompt and the completion with the best mean accuracy: the policy's next training data.

    The published rule: the first of those with the same mean, of repeats rounded to 4 digits. Never one that is blank,
    which teaches nothing, or ungraded, which is not known to be good: an article with no other is left out.
    InputError for an article without a prompt.
    """
    rewards: dict[tuple[int, int], float] = {}
    for i, article in enumerate(result.articles):
        require(bool(article.prompt.strip()), f"articles[{i}].prompt", article.prompt, "what was sampled from")
        for j, judged in enumerate(article.completions):
            reward = completion_stats(judged.questions)["adapter_mean"]
            if reward is not None and judged.text.strip():
                rewards[i, j] = reward
    best = [(result.articles[i], j) for i, j in best_of_each(rewards)]
    return [{"prompt": article.prompt, "completion": article.completions[j].text} for article, j in best]
