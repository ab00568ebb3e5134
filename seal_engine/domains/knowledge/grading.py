"""Who was right: graders by string, by the model itself, or by a model behind an endpoint.

A grader takes (question, right answer, given answer) triples and gives 1.0, 0.0 or None for each. None is an answer
that could not be graded. It is no wrong answer: it is left out of every mean, counted, and logged with its reason.
"""

import logging
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from seal_engine.domains.knowledge.endpoint import Endpoint, complete, count_errors, first_error
from seal_engine.files import show
from seal_engine.loop.inner import Backend
from seal_engine.sampling.requests import SamplingParams
from seal_engine.types import InputError, require

Grader = Callable[[list[tuple[str, str, str]]], list[float | None]]
GRADERS = ("exact", "contains", "model", "endpoint")
TEMPLATE = Path(__file__).parents[1] / "templates" / "grade.txt"
PLACEHOLDER = re.compile(r"\{(?:question|answer|prediction)\}")
VERDICT_TOKENS = 8  # of a model that grades: "yes" with what may stand around it
NEITHER = "neither yes nor no"
# Dashes and quotes that typesetters use, and their ASCII twins.
TWINS = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
    "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033"
    "\u2018\u2019\u201a\u201b\u2032\u02bc`",
    "-" * 7 + '"' * 7 + "'" * 7,
)
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Punctuation that is part of a number (1.5, .5, 10:30, 1/2, 1914-1918, a sign), or else the punctuation to take out.
PUNCTUATION = re.compile(
    rf"(?<=\d)[-.,:/](?=\d)|(?<!\w)\.(?=\d)|(?<!\S)-(?=\.?\d)|(?P<out>[{re.escape(string.punctuation)}])"
)
VERDICT = re.compile(r"\W*(?:(yes)\b(?!.*\bno\b)|no(?=\W*$|[^\w\s])(?!.*\byes\b))", re.IGNORECASE)
log = logging.getLogger("seal_engine")


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation and the words a, an, the; single spaces.

    Unlike SQuAD's own evaluation, it keeps the punctuation inside of numbers (1.5 million is not 15 million), and takes
    typographic dashes and quotes and decomposed accents for the same as their plain twins.
    """
    twin = unicodedata.normalize("NFC", text).lower().translate(TWINS)
    plain = PUNCTUATION.sub(lambda match: "" if match["out"] else match[0], THOUSANDS.sub("", twin))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, gold: str) -> float:
    """1.0 if the normal forms are the same, else 0.0."""
    given, wanted = _words(answer, gold)
    return float(bool(wanted) and given == wanted)


def contains(answer: str, gold: str) -> float:
    """1.0 if the words of gold's normal form follow one another somewhere in the answer's, else 0.0."""
    given, wanted = _words(answer, gold)
    places = range(len(given) - len(wanted) + 1) if wanted else ()
    return float(any(given[i : i + len(wanted)] == wanted for i in places))


def _words(answer: str, gold: str) -> tuple[list[str], list[str]]:
    """Words of both in normal form; in lower case where the normal form of gold is empty, as that of "A" is."""
    form = normalize if normalize(gold) else str.lower
    return form(answer).split(), form(gold).split()


def check_template(template: str | None) -> str:
    """A template without its last newline; None: the package's own. InputError if a placeholder is not in it.

    {question}, {answer} and {prediction} are placeholders. Other braces are text like any other.
    """
    text = TEMPLATE.read_text("utf-8") if template is None else template
    if not isinstance(text, str):
        raise InputError(f"template: found {show(template)}; accepted: text")
    absent = sorted({"{question}", "{answer}", "{prediction}"} - set(PLACEHOLDER.findall(text)))
    require(not absent, "template", f"no {', no '.join(absent)}", "text with {question}, {answer} and {prediction}")
    return text.removesuffix("\n")


def grade_prompt(template: str, question: str, gold: str, prediction: str) -> str:
    """The template filled in at once, so that braces in an answer stay what they are."""
    values = {"{question}": question.strip(), "{answer}": gold.strip(), "{prediction}": prediction.strip()}
    return PLACEHOLDER.sub(lambda match: values[match[0]], template)


def parse_verdict(text: str) -> float | None:
    """1.0 if the first line that is not blank begins with yes, 0.0 if it begins with no; None otherwise, or with both.

    A "no" is followed by punctuation or by nothing: "no one" is no verdict.
    """
    lines = text.strip().splitlines()
    match = VERDICT.match(lines[0]) if lines else None
    return None if match is None else float(match[1] is not None)


def make_grader(
    name: str,
    engine: Backend | None = None,
    endpoint: Endpoint | None = None,
    template: str | None = None,
    chat: bool = False,
) -> Grader:
    """A grader: "exact", "contains", "model" (which needs an engine) or "endpoint" (which needs one).

    template: what the last two ask (see `check_template`). chat: the model is asked by a user's turn of its chat
    template. Raises InputError for what is missing or unknown.
    """
    require(name in GRADERS, "grader", name, f"one of {list(GRADERS)}")
    text = check_template(template)
    if name == "model":
        if engine is None or not hasattr(engine, "generate"):
            raise InputError(f"engine: found {show(engine)}; accepted: an Engine, for the grader 'model'")
        return partial(_grade_by_model, engine, text, chat)
    if name == "endpoint":
        if not isinstance(endpoint, Endpoint):
            raise InputError(f"endpoint: found {show(endpoint)}; accepted: an Endpoint, for the grader 'endpoint'")
        return partial(_grade_by_endpoint, endpoint, text)
    compare = exact_match if name == "exact" else contains
    return lambda triples: [compare(prediction, gold) for _, gold, prediction in triples]


def _grade_by_model(
    engine: Backend, template: str, chat: bool, triples: list[tuple[str, str, str]]
) -> list[float | None]:
    """Grades by the base model, greedily."""
    params = SamplingParams(temperature=0, max_tokens=VERDICT_TOKENS)
    prompts: list[str | list[int]] = [grade_prompt(template, *triple) for triple in triples]
    if chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [engine.tokenizer.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    outputs = engine.generate(prompts, params, progress=False)
    verdicts = [parse_verdict(out.outputs[0].text) if out.error is None else None for out in outputs]
    failed = Counter(out.error for out in outputs if out.error is not None)
    _log_ungraded(verdicts, failed)
    return verdicts


def _grade_by_endpoint(endpoint: Endpoint, template: str, triples: list[tuple[str, str, str]]) -> list[float | None]:
    """Grades by the endpoint's model, greedily."""
    replies = complete(endpoint, [grade_prompt(template, *triple) for triple in triples], VERDICT_TOKENS)
    verdicts = [None if reply.text is None else parse_verdict(reply.text) for reply in replies]
    _log_ungraded(verdicts, Counter(count_errors(replies)), first_error(replies))
    return verdicts


def _log_ungraded(verdicts: list[float | None], failed: Counter[str], example: str = "") -> None:
    """Warn of answers without a grade, with the number of each reason, and with an example."""
    ungraded = verdicts.count(None)
    if ungraded:
        reasons = failed + Counter({NEITHER: ungraded - failed.total()})
        shown = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
        log.warning("%d of %d answers are ungraded: %s%s", ungraded, len(verdicts), shown, example)
