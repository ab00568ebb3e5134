"""The errors that end a command with one line, and the name that a mistyped one was probably meant to be.

Nothing heavy is imported here, so that the command line can name a mistake before torch is loaded.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A user's mistake: the message names the file or field, what was found and what is accepted."""


class RunError(RuntimeError):
    """A run cannot go on: the message says why. The steps that were finished before are recorded."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" for the most similar of `names`, or nothing where none is similar."""
    similar = get_close_matches(name, list(names), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""
