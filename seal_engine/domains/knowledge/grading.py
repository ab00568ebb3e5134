"""Who was right: graders by string, by the model itself, or by a model behind an endpoint.

A grader takes (question, right answer, given answer) triples and gives 1.0, 0.0 or None for each. None is an answer
that could not be graded. It is no wrong answer: it is left out of every mean, counted, and logged with its reason.
"""

import logging
import re
import string
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from seal_engine.domains.knowledge.endpoint import Endpoint, complete, count_errors
from seal_engine.engine import Engine
from seal_engine.files import show
from seal_engine.sampling.requests import SamplingParams
from seal_engine.types import InputError, require

Grader = Callable[[list[tuple[str, str, str]]], list[float | None]]
GRADERS = ("exact", "contains", "model", "endpoint")
TEMPLATE = Path(__file__).parents[1] / "templates" / "grade.txt"
PLACEHOLDER = re.compile(r"\{(?:question|answer|prediction)\}")
VERDICT_TOKENS = 8  # of a model that grades: "yes" with what may stand around it
NEITHER = "neither yes nor no"
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
log = logging.getLogger("seal_engine")


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation and the words a, an, the; single spaces."""
    plain = text.lower().translate(WITHOUT_PUNCTUATION)
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
    """1.0 for yes and 0.0 for no, if that is all there is on the first line that is not blank; None otherwise."""
    lines = text.strip().splitlines()
    word = lines[0].strip(string.punctuation + string.whitespace).lower() if lines else ""
    return {"yes": 1.0, "no": 0.0}.get(word)


def make_grader(
    name: str,
    engine: Engine | None = None,
    endpoint: Endpoint | None = None,
    template: str | None = None,
) -> Grader:
    """A grader: "exact", "contains", "model" (which needs an engine) or "endpoint" (which needs one).

    template: what the last two ask (see `check_template`). Raises InputError for what is missing or unknown.
    """
    require(name in GRADERS, "grader", name, f"one of {list(GRADERS)}")
    text = check_template(template)
    if name == "model":
        if not isinstance(engine, Engine):
            raise InputError(f"engine: found {show(engine)}; accepted: an Engine, for the grader 'model'")
        return partial(_grade_by_model, engine, text)
    if name == "endpoint":
        if not isinstance(endpoint, Endpoint):
            raise InputError(f"endpoint: found {show(endpoint)}; accepted: an Endpoint, for the grader 'endpoint'")
        return partial(_grade_by_endpoint, endpoint, text)
    compare = exact_match if name == "exact" else contains
    return lambda triples: [compare(prediction, gold) for _, gold, prediction in triples]


def _grade_by_model(engine: Engine, template: str, triples: list[tuple[str, str, str]]) -> list[float | None]:
    """Grades by the base model, greedily."""
    params = SamplingParams(temperature=0, max_tokens=VERDICT_TOKENS)
    outputs = engine.generate([grade_prompt(template, *triple) for triple in triples], params, progress=False)
    verdicts = [parse_verdict(out.outputs[0].text) if out.error is None else None for out in outputs]
    failed = Counter(out.error for out in outputs if out.error is not None)
    _log_ungraded(verdicts, failed)
    return verdicts


def _grade_by_endpoint(endpoint: Endpoint, template: str, triples: list[tuple[str, str, str]]) -> list[float | None]:
    """Grades by the endpoint's model, greedily."""
    replies = complete(endpoint, [grade_prompt(template, *triple) for triple in triples], VERDICT_TOKENS)
    verdicts = [None if reply.text is None else parse_verdict(reply.text) for reply in replies]
    _log_ungraded(verdicts, Counter(count_errors(replies)))
    return verdicts


def _log_ungraded(verdicts: list[float | None], failed: Counter[str]) -> None:
    """Warn of answers without a grade, with the number of each reason."""
    ungraded = verdicts.count(None)
    if ungraded:
        reasons = failed + Counter({NEITHER: ungraded - failed.total()})
        shown = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
        log.warning("%d of %d answers are ungraded: %s", ungraded, len(verdicts), shown)
