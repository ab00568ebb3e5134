"""Cutting a self-edit, what a model wrote about a passage, into training sequences: SEAL's published rules.

Each sequence is the title, a newline, and a piece of the text.

- Without split_newlines, pieces end at each `---`.
- With it, pieces are lines, and `---` ends one too. If the second piece starts with "1.", the first introduces the list
  and is left out.
- With it, text in question-answer form is cut before each "Question N:" that starts a line, and nowhere else. Prompts
  for that form end in "Question 1:", so a first piece that lacks it gets it back.

One departure: a completion of nothing but white space and `---` gives no sequence, not one of the title alone.
"""

import re

from seal_engine.types import require

NUMBERED_QUESTION = re.compile(r"Question\s+\d+:")
ANSWER = re.compile(r"Answer\s*:")
BEFORE_QUESTION = re.compile(r"\n(?=Question\s+\d+:)")


def split(completion: str, title: str, passage: str | None = None, split_newlines: bool = True) -> list[str]:
    """The training sequences of a completion; passage, if given and not blank, is the last. None of them is empty.

    Raises InputError for arguments that are no text.
    """
    for name, value in (("completion", completion), ("title", title)):
        require(isinstance(value, str), name, value, "text")
    require(passage is None or isinstance(passage, str), "passage", passage, "text or None")
    require(isinstance(split_newlines, bool), "split_newlines", split_newlines, "True or False")
    texts = pieces(completion, split_newlines)
    if passage is not None and passage.strip():
        texts.append(passage.strip())
    return [f"{title}\n{text}" for text in texts]


def pieces(completion: str, split_newlines: bool = True) -> list[str]:
    """The pieces of a completion, without titles: none of them blank, in their order."""
    if split_newlines and NUMBERED_QUESTION.search(completion) and ANSWER.search(completion):
        questions = BEFORE_QUESTION.split(completion.strip())
        if not questions[0].startswith("Question"):
            questions[0] = f"Question 1: {questions[0].strip()}"
        return questions
    parts = completion.split("---")
    if split_newlines:
        parts = [line for part in parts for line in part.splitlines()]
    texts = [part.strip() for part in parts if part.strip()]
    has_preamble = split_newlines and len(texts) > 1 and texts[1].startswith("1.")
    return texts[1:] if has_preamble else texts
