"""contexts.json: passages and questions as a run had them, so that its report needs no other file."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from seal_engine.domains.knowledge.passages import Passage, Question
from seal_engine.files import read_json, replace_file

CONTEXTS = "contexts.json"


def write_contexts(passages: Mapping[str, Passage], directory: Path) -> None:
    """Write passages, by the name of their context, into a run's directory; nothing if they are there already."""
    named = {name: {"title": p.title, "context": p.context, "questions": p.questions} for name, p in passages.items()}
    content = (json.dumps(named, ensure_ascii=False, indent=1, default=asdict) + "\n").encode()
    file = directory / CONTEXTS
    if not file.exists() or file.read_bytes() != content:
        replace_file(file, content)


def read_contexts(directory: Path) -> dict[str, Passage]:
    """Passages by the name of their context; none where the run recorded none, as those of other tasks."""
    return {
        name: Passage(one["title"], one["context"], tuple(Question(**question) for question in one["questions"]))
        for name, one in read_json(directory / CONTEXTS, required=False).items()
    }
