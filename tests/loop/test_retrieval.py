"""Routing on documents whose right answers are known, and thresholds that are worked out by hand."""

import math

import pytest
import torch

from seal_engine.loop.retrieval import BM25, Cosine, Document, Router, choose_threshold

ANN = Document("Ann Lee", ("Where does Ann Lee live? Oslo", "What does Ann Lee play? cello"))
BEN = Document("Ben Kirk", ("Where does Ben Kirk live? Rome", "What does Ben Kirk play? flute"))
OTHERS = ["Where does Kim Dale live? Paris", "What does Kim Dale play? drum", "Who is Joe Ford? a doctor"]
MORE = ["Where does Sue Hill live? Lima", "What does Tom West play? harp"]


def test_bm25_by_hand():
    """One word that one of three texts has: idf = ln(1 + 2.5 / 1.5), the document being of mean length, f = 1; in the
    title it counts twice more."""
    scorer, idf = BM25(["green"]), math.log(1 + 2.5 / 1.5)
    documents = [Document("blue", ("red",)), Document("pink", ("grey",))]
    assert scorer.scores("red", documents) == pytest.approx([idf, 0.0])
    assert scorer.scores("blue", documents) == pytest.approx([3 * idf, 0.0])


def test_a_word_that_every_text_has_counts_less_than_a_name():
    scorer = BM25(OTHERS)
    assert scorer.scores("Where does Ann Lee live?", [ANN, BEN])[0] > scorer.scores("Where does", [ANN, BEN])[0] * 2


def test_questions_reach_their_edit_or_none():
    router = Router(BM25(OTHERS), MORE)
    assert router.route("Where does Ann Lee live?") is None
    router.add(ANN)
    router.add(BEN)
    assert router.route("What would Ann Lee bring to a band?") == 0
    assert router.route("Which town would BEN KIRK call home?") == 1
    assert router.route("Where does Zoe Hart live?") is None
    assert router.route("") is None


def test_a_rolled_back_edit_is_not_found():
    router = Router(BM25(OTHERS), MORE)
    router.add(ANN)
    router.add(BEN)
    router.remove(0)
    assert router.route("What does Ann Lee play?") is None
    assert router.route("What does Ben Kirk play?") == 0


def test_cosine_takes_the_nearest_piece():
    """Vectors by hand: the second piece of the second document points the way of the query."""
    vectors = {"q": [1.0, 1.0], "a": [1.0, 0.0], "b": [-1.0, 0.0], "c": [2.0, 2.0], "n": [0.0, 0.0]}
    scorer = Cosine(["n"], lambda texts: torch.tensor([vectors[text] for text in texts]))
    scores = scorer.scores("q", [Document("x", ("a",)), Document("y", ("b", "c"))])
    assert scores == pytest.approx([2**-0.5, 1.0])


@pytest.mark.parametrize(
    ("above", "below", "threshold"),
    [
        pytest.param([5.0, 4.0], [1.0, 2.0], 3.0, id="a gap: its middle"),
        pytest.param([5.0, 4.0, 0.5], [1.0, 2.0, 0.0], 3.0, id="one of three is lost on one side"),
        pytest.param([1.0], [], -math.inf, id="nothing to refuse"),
        pytest.param([], [1.0], math.inf, id="nothing to find"),
    ],
)
def test_thresholds(above, below, threshold):
    assert choose_threshold(above, below) == threshold
