"""What a text has from a passage, marked.

A telling word is one of three letters or more, or a number, that is not common and not in the passage's title.
"""

import re
from collections import defaultdict

from seal_engine.svg import clean

WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
RUN = 3  # words in a row that count as copied
COMMON = """
about after all also among and any are because been before being between both but can could did does done during each
ever every for from get got had has have having her him his how into its just less like made make many may might more
most much must nor not now off one only other our out over per same she should since some such than that the their
them then there these they this those through too two under until upon very was were what when where which while who
whom why will with within would yet you your
"""  # words that a text has without having read the passage


def mark_copied(text: str, passage: str, title: str = "") -> str:
    """A text as HTML: <mark> around RUN or more words in a row as in the passage, <u> around a single word of it.

    A single word has to be telling, and so has one word of a run.
    """
    spans = [match.span() for match in WORD.finditer(text)]
    mine = [text[start:end].casefold() for start, end in spans]
    copied = _copied_runs(mine, [word.casefold() for word in WORD.findall(passage)])
    telling = _telling(passage) - {word.casefold() for word in WORD.findall(title)}
    parts, at, i = [], 0, 0
    while i < len(mine):
        length = copied.get(i, 0)
        length = length if telling.intersection(mine[i : i + length]) else 0
        tag = "mark" if length else "u" if mine[i] in telling else ""
        start, end = spans[i][0], spans[i + max(1, length) - 1][1]
        parts.append(clean(text[at:start]))
        parts.append(f"<{tag}>{clean(text[start:end])}</{tag}>" if tag else clean(text[start:end]))
        at, i = end, i + max(1, length)
    return "".join(parts) + clean(text[at:])


def _telling(passage: str) -> set[str]:
    words, common = {word.casefold() for word in WORD.findall(passage)}, set(COMMON.split())
    return {word for word in words if (len(word) > 2 or word[0].isdigit()) and word not in common}


def _copied_runs(mine: list[str], theirs: list[str]) -> dict[int, int]:
    """Where a run begins -> how many words it has: the longest there, one after the other."""
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for j in range(len(theirs) - RUN + 1):
        places[tuple(theirs[j : j + RUN])].append(j)
    runs, i = {}, 0
    while i <= len(mine) - RUN:
        longest = 0
        for j in places.get(tuple(mine[i : i + RUN]), ()):
            length = RUN
            while i + length < len(mine) and j + length < len(theirs) and mine[i + length] == theirs[j + length]:
                length += 1
            longest = max(longest, length)
        if longest:
            runs[i] = longest
        i += max(1, longest)
    return runs
