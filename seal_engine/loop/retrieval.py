"""Which edit of a bank a question is about, or none: retrievers that know the edits and texts of no edit, nothing else.

BM25 (Robertson and Zaragoza, 2009): score(q, d) = sum over words w of q of
idf(w) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|)), f being how often w is in d. With a handful of edits, how rare
a word is follows from texts of no edit as well, and a word of the title counts TITLE_WEIGHT idf(w) on top: a question
names what it is about. Cosine: of mean hidden states, less their mean over texts of no edit.

Below a threshold a question belongs to no edit. The threshold is chosen from what is known: the titles of the edits,
and their pieces, each scored against its edit without that piece, should lie above it, and texts of no edit below.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

RETRIEVERS = ("bm25", "cosine")
K1, B = 1.5, 0.75  # BM25's usual constants
TITLE_WEIGHT = 2.0


@dataclass(frozen=True)
class Document:
    """An edit as a retriever sees it."""

    title: str
    pieces: tuple[str, ...]  # of its self-edit

    def without(self, i: int) -> "Document":
        """The same without a piece."""
        return Document(self.title, self.pieces[:i] + self.pieces[i + 1 :])


@lru_cache(maxsize=65536)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers."""
    return tuple(re.findall(r"\w+", text.lower()))


@lru_cache(maxsize=4096)
def bag_of_words(document: Document) -> Counter[str]:
    """How often each word is in the title and the self-edit."""
    return Counter(words(" ".join((document.title, *document.pieces))))


class BM25:
    """Scores of a query for documents; texts of no edit count for how rare a word is."""

    def __init__(self, background: Sequence[str]):
        self.background = len(background)
        self.holders = Counter(word for text in background for word in set(words(text)))  # texts that have the word

    def scores(self, query: str, documents: Sequence[Document]) -> list[float]:
        """A score for each document."""
        bags = [bag_of_words(document) for document in documents]
        mean_length = sum(map(Counter.total, bags)) / max(1, len(bags)) or 1.0
        count, scores = len(bags) + self.background, [0.0] * len(bags)
        for word in words(query):
            holders = sum(word in bag for bag in bags) + self.holders[word]
            idf = math.log(1 + (count - holders + 0.5) / (holders + 0.5))
            for i, bag in enumerate(bags):
                norm = K1 * (1 - B + B * bag.total() / mean_length)
                in_title = word in words(documents[i].title)
                scores[i] += idf * (bag[word] * (K1 + 1) / (bag[word] + norm) + TITLE_WEIGHT * in_title)
        return scores


class Cosine:
    """Cosine of a query with the nearest piece of each document. embed: texts to vectors [n, D]."""

    def __init__(self, background: Sequence[str], embed: Callable[[Sequence[str]], Tensor]):
        self.embed = embed
        self.mean = embed(background).mean(0) if background else torch.zeros(1)
        self._known: dict[str, Tensor] = {}

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
        if unknown:
            vectors = torch.nn.functional.normalize(self.embed(unknown) - self.mean, dim=1)
            self._known |= zip(unknown, vectors, strict=True)
        return torch.stack([self._known[text] for text in texts])

    def scores(self, query: str, documents: Sequence[Document]) -> list[float]:
        """A score for each document."""
        (vector,) = self._vectors([query])
        return [float((self._vectors(d.pieces or (d.title,)) @ vector).max()) for d in documents]


class Router:
    """A bank's documents, and the threshold below which a query belongs to none of them."""

    def __init__(self, retriever: BM25 | Cosine, negatives: Sequence[str]):
        """negatives: texts of no edit, others than the retriever's background."""
        self.retriever, self.negatives = retriever, negatives
        self.documents: list[Document] = []
        self.threshold = math.inf

    def add(self, document: Document) -> None:
        """One more edit; the threshold is chosen anew."""
        self.documents.append(document)
        self._calibrate()

    def remove(self, index: int) -> None:
        """Roll an edit back."""
        del self.documents[index]
        self._calibrate()

    def route(self, query: str) -> int | None:
        """The number of the edit that the query is about; None: it is about none."""
        if not self.documents:
            return None
        scores = self.retriever.scores(query, self.documents)
        best = max(range(len(scores)), key=lambda i: scores[i])
        return best if scores[best] >= self.threshold else None

    def _calibrate(self) -> None:
        above, documents = [], self.documents
        for i, document in enumerate(documents):
            above.append(self.retriever.scores(document.title, documents)[i])
            for j, piece in enumerate(document.pieces):
                others = [*documents[:i], document.without(j), *documents[i + 1 :]]
                above.append(self.retriever.scores(piece, others)[i])
        below = [max(self.retriever.scores(text, documents)) for text in self.negatives] if documents else []
        self.threshold = choose_threshold(above, below)


def choose_threshold(above: Sequence[float], below: Sequence[float]) -> float:
    """The threshold with the most balanced accuracy: the mean of the shares that lie on their sides of it.

    Candidates are the middles between neighbouring scores; of equal ones the one in the widest gap.
    """
    if not above or not below:
        return -math.inf if above else math.inf
    ordered = sorted({*above, *below})
    edges = [ordered[0] - 1.0, *ordered, ordered[-1] + 1.0]

    def quality(pair: tuple[float, float]) -> tuple[float, float]:
        middle = sum(pair) / 2
        kept = sum(score >= middle for score in above) / len(above)
        refused = sum(score < middle for score in below) / len(below)
        return round(kept + refused, 9), pair[1] - pair[0]

    low, high = max(pairwise(edges), key=quality)
    return (low + high) / 2
