"""Templates: files in which {names} stand for what is filled in. People may bring their own."""

import re
from collections.abc import Mapping
from pathlib import Path

from seal_engine.files import read_text
from seal_engine.types import InputError, require

TEMPLATES = Path(__file__).parent / "templates"
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


def read_template(path: str, shipped: str, *needed: str) -> str:
    """A template's text without its last newline, which editors add; path "": the shipped one.

    InputError where it is missing, or lacks one of the {names} that it needs.
    """
    text = read_text(Path(path) if path else TEMPLATES / shipped)
    if text is None:
        raise InputError(f"{path}: missing; accepted: a file with a template")
    for name in needed:
        require(f"{{{name}}}" in text, path or shipped, f"no {{{name}}}", f"a template with {{{name}}}")
    return text.removesuffix("\n")


def strip_fence(text: str) -> str:
    """The text without white space around it and without the Markdown fence around all of it, if there is one."""
    stripped = text.strip()
    fenced = FENCE.fullmatch(stripped)
    return fenced[1].strip() if fenced else stripped


def fill(template: str, values: Mapping[str, object]) -> str:
    """The template with every {name} of values in its place, and nothing else changed."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)
