"""SEAL's files: datasets, completions and results in; results and fine-tuning data out, in the published format."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seal_engine.domains.knowledge.passages import Passage, Question, Record, passage_of, read_document, refuse
from seal_engine.domains.knowledge.results import (
    Article,
    Asked,
    Judged,
    Result,
    article_stats,
    completion_stats,
    overall_stats,
    rounded,
)
from seal_engine.files import complete_file
from seal_engine.types import InputError


def read_passages(path: str | Path) -> list[Passage]:
    """The passages of a dataset, of a file of completions, or of a result.

    InputError naming the file, the record and the field for everything that is not one of these, and for a passage that
    is there twice.
    """
    document = read_document(path)
    if isinstance(document, dict) and "articles" in document:
        passages = [_asked_passage(a, f"{path}: articles[{i}]") for i, a in enumerate(_result(document, path).articles)]
    elif isinstance(document, list) and document:
        passages = [passage_of(Record(value, f"{path}: [{i}]")) for i, value in enumerate(document)]
    else:
        refuse(str(path), document, "a list of passages, at least one, or a result with articles")
    first: dict[tuple[str, str], int] = {}
    for i, passage in enumerate(passages):
        same = first.setdefault((passage.title, passage.context), i)
        if same != i:
            raise InputError(f"{path}: [{i}]: found the title and context of [{same}]; accepted: each passage once")
    return passages


def _asked_passage(article: Article, place: str) -> Passage:
    """An article as a passage. InputError unless every completion was asked the same in every repeat."""
    asked: list[tuple[Question, ...]] = []
    for completion in article.completions:
        by_rep: dict[int, list[Question]] = {}
        for one in completion.questions:
            by_rep.setdefault(one.rep, []).append(Question(one.question, one.answer))
        asked += map(tuple, by_rep.values())
    if len(set(asked)) != 1:
        raise InputError(f"{place}: found differing questions; accepted: the same for each completion and repeat")
    texts = tuple(completion.text for completion in article.completions)
    return Passage(article.title, article.context, asked[0], texts, article.prompt or None)


def read_result(path: str | Path) -> Result:
    """A result that SEAL or `write_result` wrote. InputError naming the file, the record and the field.

    The statistics in it are not read: they follow from the grades.
    """
    return _result(read_document(path), path)


def _result(document: Any, path: str | Path) -> Result:
    if not isinstance(document, dict):
        refuse(str(path), document, "an object with articles")
    top = Record(document, f"{path}: result")
    if not isinstance(top["split_newlines"], bool):
        refuse(top.at("split_newlines"), top["split_newlines"], "true or false")
    return Result(
        tuple(_article(record) for record in top.records("articles")),
        top.text("timestamp", blank=True),
        top.text("model", blank=True),
        top.text("dataset", blank=True),
        top["split_newlines"],
        top.integer("k_completions", 0),
        top.integer("eval_times", 0),
        Record(top["lora_params"], top.at("lora_params")).value,
    )


def _article(record: Record) -> Article:
    completions = tuple(
        Judged(judged.text("text", blank=True), tuple(_asked(asked) for asked in judged.records("questions")))
        for judged in record.records("completions")
    )
    prompt = record.text("prompt", blank=True) if "prompt" in record else ""
    return Article(record.text("title"), record.text("context"), completions, prompt)


def _asked(record: Record) -> Asked:
    for name in ("baseline_correct", "adapter_correct"):
        if not isinstance(record[name], bool | None):
            refuse(record.at(name), record[name], "true, false or null")
    return Asked(
        record.integer("rep", 0),
        record.text("question"),
        record.text("answer"),
        record.text("baseline_answer", blank=True),
        record.text("adapter_answer", blank=True),
        record["baseline_correct"],
        record["adapter_correct"],
    )


def write_result(path: str | Path, result: Result) -> None:
    """Write the published result JSON with all statistics. The file appears complete or not at all.

    InputError if it cannot be written there, or holds text or numbers that JSON in UTF-8 cannot.
    """
    stats = [[completion_stats(judged.questions) for judged in article.completions] for article in result.articles]
    articles = [
        {
            "stats": rounded(article_stats(own)),
            "title": article.title,
            "context": article.context,
            "completions": [
                {"text": judged.text, "stats": one, "questions": [asdict(asked) for asked in judged.questions]}
                for judged, one in zip(article.completions, own, strict=True)
            ],
            "prompt": article.prompt,
        }
        for article, own in zip(result.articles, stats, strict=True)
    ]
    document = {
        "overall": rounded(overall_stats(stats)),
        "timestamp": result.timestamp,
        "model": result.model,
        "dataset": result.dataset,
        "split_newlines": result.split_newlines,
        "n_articles": len(result.articles),
        "k_completions": result.k_completions,
        "eval_times": result.eval_times,
        "lora_params": dict(result.lora_params),
        "articles": articles,
    }
    try:
        text = json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"result: {error}; accepted: what JSON can hold") from None
    _write_text(Path(path), text)


def write_sft(path: str | Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object a line, as SEAL's fine-tuning reads it. Complete or not at all; InputError if it cannot."""
    _write_text(Path(path), "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))


def _write_text(file: Path, text: str) -> None:
    """A file in UTF-8 that appears complete or not at all, in place of the one that was there."""
    try:
        content = text.encode()
        target = Path(os.path.realpath(file))  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(target) as partial:
            partial.write_bytes(content)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have, a lone surrogate
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file}: {reason}; accepted: a file that can be written, and text in UTF-8") from None
