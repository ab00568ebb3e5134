"""Passages and their questions, and the checks that JSON which people or programs wrote has to pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from seal_engine.errors import did_you_mean
from seal_engine.files import read_text, show, strict_json
from seal_engine.types import InputError


@dataclass(frozen=True)
class Question:
    """A question and the answer that counts as right."""

    question: str
    answer: str


@dataclass(frozen=True)
class Passage:
    """A text to learn, and the questions that show whether it was."""

    title: str
    context: str
    questions: tuple[Question, ...]
    completions: tuple[str, ...] = ()  # self-edits, in the order they were sampled; one may be blank
    prompt: str | None = None  # what they were sampled from


def read_document(path: str | Path) -> Any:
    """What a JSON file holds. InputError naming the file if that is not JSON, has NaN, or a key twice in an object."""
    try:
        text = read_text(Path(path))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"path: found {show(path)}; accepted: the name of a file") from None
    if text is None:
        raise InputError(f"{path}: missing")
    if not text.strip():
        raise InputError(f"{path}: found an empty file; accepted: JSON")
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}; accepted: JSON") from None


class Record:
    """A JSON object and its place in a file, which every refusal names."""

    def __init__(self, value: Any, place: str):
        if not isinstance(value, dict):
            refuse(place, value, "an object")
        self.value = value
        self.place = place

    def __contains__(self, name: str) -> bool:
        return self.value.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        """The field's value, None where it is missing: None is no text, no list and no number either."""
        return self.value.get(name)

    def at(self, name: str) -> str:
        """The field's place."""
        return f"{self.place}.{name}"

    def refuse(self, name: str, accepted: str) -> NoReturn:
        """Raise InputError for the field; where it is missing, with the keys that are there: one may be its typo."""
        if name not in self:
            keys = ", ".join(map(repr, self.value)) or "none"
            accepted += f"; the keys there: {keys}{did_you_mean(name, self.value)}"
        refuse(self.at(name), self[name], accepted)

    def text(self, name: str, blank: bool = False) -> str:
        """The field's text. InputError if it is none, or is blank where that is not allowed."""
        if name not in self:
            self.refuse(name, "text" if blank else "text that is not blank")
        return check_text(self[name], self.at(name), blank)

    def integer(self, name: str, least: int) -> int:
        """The field's integer. InputError if it is none, or is too small."""
        value = self[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(name, f"an integer >= {least}")
        return value

    def items(self, name: str, accepted: str = "a list") -> Iterator[tuple[Any, str]]:
        """The field's list, each item with its place. InputError if it is none."""
        value = self[name]
        if not isinstance(value, list):
            self.refuse(name, accepted)
        return ((item, f"{self.at(name)}[{i}]") for i, item in enumerate(value))

    def records(self, name: str) -> Iterator["Record"]:
        """The field's objects, at least one. InputError if there is none, or something else among them."""
        accepted = "a list of objects, at least one"
        items = list(self.items(name, accepted))
        if not items:
            refuse(self.at(name), [], accepted)
        return (Record(value, place) for value, place in items)


def check_text(value: Any, place: str, blank: bool = False) -> str:
    """The value, if it is text that can be tokenized and written. InputError otherwise."""
    if not isinstance(value, str) or not (blank or value.strip()):
        refuse(place, value, "text" if blank else "text that is not blank")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        refuse(place, value, "text without lone surrogates, which UTF-8 cannot hold")
    return value


def refuse(place: str, found: Any, accepted: str) -> NoReturn:
    """Raise InputError."""
    shown = "nothing" if found is None else show(found)
    raise InputError(f"{place}: found {shown}; accepted: {accepted}")


def passage_of(record: Record) -> Passage:
    """A passage as datasets and files of completions have it. InputError naming the field."""
    questions = tuple(Question(q.text("question"), q.text("answer")) for q in record.records("questions"))
    completions: tuple[str, ...] = ()
    if "completions" in record:
        completions = tuple(check_text(value, place, blank=True) for value, place in record.items("completions"))
    prompt = record.text("prompt") if "prompt" in record else None
    return Passage(record.text("title"), record.text("context"), questions, completions, prompt)
