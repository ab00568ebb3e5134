"""SEAL's own files in and out: the published ones, statistics worked out by hand, and files that are refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_engine import InputError
from seal_engine.domains.knowledge.passages import Passage, Question
from seal_engine.domains.knowledge.results import (
    Article,
    Asked,
    Judged,
    Result,
    article_stats,
    completion_stats,
    overall_stats,
    select,
)
from seal_engine.domains.knowledge.seal_files import read_passages, read_result, write_result, write_sft
from seal_engine.domains.knowledge.self_edits import split

SHARED = Path(__file__).parents[2].parent / "shared/data/seal"
published = pytest.mark.skipif(not SHARED.is_dir(), reason="the published files are not on this machine")

DATASET = [
    {"title": "T", "context": "A passage.", "questions": [{"question": "Who?", "answer": "She"}]},
    {"title": "T", "context": "Another.", "questions": [{"question": "A?", "answer": "B"}] * 2, "id": 7},
]
COMPLETIONS = [{**record, "completions": ["1. A.", ""], "prompt": "Read:\n"} for record in DATASET]
ASKED = {
    "rep": 0,
    "question": "Who?",
    "answer": "She",
    "baseline_answer": "",
    "adapter_answer": "She.",
    "baseline_correct": False,
    "adapter_correct": None,
}
RESULT = {
    "timestamp": "0508_015401",
    "model": "base",
    "dataset": "train.json",
    "split_newlines": True,
    "n_articles": 1,
    "k_completions": 1,
    "eval_times": 2,
    "lora_params": {"rank": 32},
    "articles": [
        {
            "title": "T",
            "context": "A passage.",
            "completions": [{"text": "1. A.", "questions": [ASKED, {**ASKED, "rep": 1, "adapter_correct": True}]}],
            "prompt": "Read:\n",
        }
    ],
}
KINDS = {"dataset": DATASET, "completions": COMPLETIONS, "result": RESULT}


def changed(kind: str, *path, value: Any = ...) -> str:
    """The JSON of that kind with one value in place of another, or without it."""
    document = json.loads(json.dumps(KINDS[kind]))
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(document)


# Published files


@published
def test_published_passages():
    dataset = read_passages(SHARED / "squad_val_200.json")
    assert len(dataset) == 200
    assert sum(len(p.questions) for p in dataset) == 1001
    assert dataset[0].title == "Super Bowl 50"
    assert dataset[0].questions[4].answer == "gold"
    assert all(p.completions == () and p.prompt is None for p in dataset)
    completions = read_passages(SHARED / "iter0_train.json")
    assert len(completions) == 100
    assert all(len(p.completions) == 10 and p.prompt and p.context in p.prompt for p in completions)
    judged = read_passages(SHARED / "rank_iter0.json")
    assert [(p.title, p.context, p.questions, p.prompt) for p in judged] == [
        (p.title, p.context, p.questions, p.prompt) for p in completions[:50]
    ]
    assert [p.completions for p in judged] == [p.completions[:5] for p in completions[:50]]


@published
def test_published_sequences():
    """The published round had 8.7 sequences a self-edit."""
    passages = read_passages(SHARED / "rank_iter0.json")
    counts = [len(split(text, p.title, p.context)) for p in passages for text in p.completions]
    assert len(counts) == 250
    assert sum(counts) / len(counts) == pytest.approx(8.7, abs=0.05)


@published
def test_published_statistics_follow_from_the_grades():
    """Exactly, before rounding too: the same values in the same arithmetic."""
    document = json.loads((SHARED / "rank_iter0.json").read_text())
    result = read_result(SHARED / "rank_iter0.json")
    stats = [[completion_stats(judged.questions) for judged in article.completions] for article in result.articles]
    for article, own in zip(document["articles"], stats, strict=True):
        assert [one["stats"] for one in article["completions"]] == own
        assert article["stats"] == {name: round(value, 4) for name, value in article_stats(own).items()}  # pyright: ignore
    assert document["overall"] == {name: round(value, 4) for name, value in overall_stats(stats).items()}  # pyright: ignore


@published
def test_a_published_result_is_written_back_byte_for_byte(tmp_path):
    write_result(tmp_path / "result.json", read_result(SHARED / "rank_iter0.json"))
    assert (tmp_path / "result.json").read_bytes() == (SHARED / "rank_iter0.json").read_bytes()


@published
def test_the_published_choice_byte_for_byte(tmp_path):
    write_sft(tmp_path / "sft.jsonl", select(read_result(SHARED / "rank_iter0.json")))
    assert (tmp_path / "sft.jsonl").read_bytes() == (SHARED / "sft_best1of5_iter0.jsonl").read_bytes()


# Statistics by hand


def asked(rep: int, baseline: float | None, adapter: float | None) -> Asked:
    return Asked(rep, "Q?", "A", "x", "y", baseline, adapter)


def judged(*adapter: float | None, text: str = "text") -> Judged:
    return Judged(text, tuple(asked(0, False, grade) for grade in adapter))


def result(*articles: Article) -> Result:
    return Result(articles, "0508_015401", "base", "train.json", True, 1, 1, {"rank": 32})


def test_statistics_of_one_completion():
    questions = [asked(0, 0, 1), asked(0, 0, 0), asked(0, 1, 1), asked(1, 0, 0), asked(1, 0, 1), asked(1, 0, 0)]
    assert completion_stats(questions) == {
        "baseline_mean": pytest.approx(0.16665, abs=1e-12),  # of 0.3333 and 0
        "baseline_std": pytest.approx(0.3333 / 2**0.5, abs=1e-12),  # of a sample: over n - 1
        "adapter_mean": pytest.approx(0.5, abs=1e-12),  # of 0.6667 and 0.3333
        "adapter_std": pytest.approx(0.3334 / 2**0.5, abs=1e-12),
        "gain_mean": pytest.approx(0.3333, abs=1e-12),  # both gains are 1/3: rounded after the difference
    }


def test_one_repeat_has_no_spread():
    assert completion_stats([asked(0, 1, 1), asked(0, 0, 1)]) == {
        **{"baseline_mean": 0.5, "baseline_std": 0.0, "adapter_mean": 1.0, "adapter_std": 0.0, "gain_mean": 0.5}
    }


def test_ungraded_answers_are_left_out_and_counted():
    # Graded on both sides are the first and the last; the second repeat has no adapter's grade.
    questions = [asked(0, 0, 1), asked(0, None, 1), asked(0, 1, None), asked(1, 1, None), asked(2, 1, 0)]
    stats = completion_stats(questions)
    assert stats == {
        "baseline_mean": pytest.approx((0.5 + 1 + 1) / 3),
        "baseline_std": pytest.approx((1 / 12) ** 0.5),
        "adapter_mean": 0.5,
        "adapter_std": pytest.approx(0.5**0.5),
        "gain_mean": 0.0,
        "ungraded": 3,
    }
    nothing = completion_stats([asked(0, None, None)])
    assert nothing == {
        **dict.fromkeys(("baseline_mean", "baseline_std", "adapter_mean", "adapter_std", "gain_mean")),
        "ungraded": 2,
    }
    assert article_stats([stats, nothing]) == {
        "baseline_accuracy": pytest.approx(2.5 / 3),
        "adapter_mean_accuracy": 0.5,
        "adapter_std_over_completions": 0.0,
        "mean_adapter_std_within_completions": pytest.approx(0.5**0.5),
        "mean_gain": 0.0,
        "ungraded": 5,
    }
    overall = overall_stats([[stats, nothing], [nothing]])
    assert overall["ungraded"] == 7
    assert overall["adapter_mean_accuracy"] == 0.5
    assert set(overall_stats([[nothing]]).values()) == {None, 2}


def test_overall_statistics():
    """Two articles, the second with one completion: means are of articles, spreads within are of completions."""
    first = [completion_stats([asked(0, 0, a), asked(1, 0, b)]) for a, b in ((0, 1), (1, 1))]
    second = [completion_stats([asked(0, 1, 0), asked(1, 0, 0)])]
    assert overall_stats([first, second]) == {
        "baseline_mean_accuracy": 0.25,
        "baseline_std_of_article_means": pytest.approx(0.5 / 2**0.5),
        "adapter_mean_accuracy": 0.375,
        "adapter_std_of_article_means": pytest.approx(0.75 / 2**0.5),
        "mean_adapter_std_over_completions": pytest.approx(0.5 / 2**0.5 / 2),
        "mean_adapter_std_within_completions": pytest.approx(0.5**0.5 / 3),
        "mean_gain": 0.125,
    }


GRADES = st.sampled_from([True, False, None, 1.0, 0.0])


ROWS = st.lists(st.tuples(st.integers(0, 2), GRADES, GRADES), min_size=1, max_size=6)


@given(st.lists(st.lists(ROWS, min_size=1, max_size=3), max_size=3))
def test_any_grades(grades):
    """Accuracies are shares, spreads and counts are not negative, and nothing fails."""
    stats = [[completion_stats([asked(*one) for one in questions]) for questions in one] for one in grades]
    missing = sum(grade is None for one in grades for questions in one for row in questions for grade in row[1:])
    overall = overall_stats(stats)
    assert overall.pop("ungraded", 0) == missing
    for name, value in overall.items():
        assert value is None or (-1 if "gain" in name else 0) <= value <= 1


@pytest.mark.parametrize("grade", [0.5, -1, 2, "yes", float("nan"), [1]])
def test_what_is_no_grade(grade):
    with pytest.raises(InputError, match=r"adapter_correct: found .*; accepted: True, False, 1\.0"):
        asked(0, True, grade)


# Choosing


def test_the_best_is_chosen_and_of_equals_the_first():
    texts = [judged(0, 0, text="a"), judged(1, 0, text="b"), judged(0, 1, text="c"), judged(None, 0, text="d")]
    assert select(result(Article("T", "C", tuple(texts), "P"))) == [{"prompt": "P", "completion": "b"}]


def test_ungraded_and_blank_completions_are_not_chosen():
    chosen = select(
        result(
            Article("T", "1", (judged(None, text="a"), judged(0, text="b")), "P1"),
            Article("T", "2", (judged(None, text="a"),), "P2"),
            Article("T", "3", (judged(1, text=" "), judged(0, text="c")), "P3"),
        )
    )
    assert chosen == [{"prompt": "P1", "completion": "b"}, {"prompt": "P3", "completion": "c"}]


def test_an_article_without_a_prompt_trains_no_policy():
    with pytest.raises(InputError, match=r"articles\[1\].prompt: found ' '; accepted: "):
        select(result(Article("T", "1", (judged(1),), "P"), Article("T", "2", (judged(1),), " ")))


# Writing


def test_a_result_is_read_back(tmp_path):
    made = result(
        Article("T", "é\n東", (judged(1, None, text='"'), judged(0, text="")), "P"), Article("U", "C", (judged(0),))
    )
    file = tmp_path / "new" / "result.json"
    write_result(file, made)
    assert read_result(file) == made
    document = json.loads(file.read_text("utf-8"))
    assert list(document) == [
        *("overall", "timestamp", "model", "dataset", "split_newlines", "n_articles", "k_completions", "eval_times"),
        *("lora_params", "articles"),
    ]
    assert document["overall"]["ungraded"] == document["articles"][0]["stats"]["ungraded"] == 1
    assert "ungraded" not in document["articles"][1]["stats"]
    assert document["articles"][0]["completions"][0]["questions"][1]["adapter_correct"] is None
    write_result(file, made)
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("place", ["directory", "file/below", "x" * 256, "null\0", "lone\udfff"])
def test_places_not_to_write_to(tmp_path, place):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for write in (lambda path: write_result(path, result()), lambda path: write_sft(path, [{"prompt": "P"}])):
        with pytest.raises(InputError, match="accepted: a file that can be written") as caught:
            write(tmp_path / place)
        assert str(tmp_path) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_what_no_file_can_hold_leaves_the_old_one(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("kept")
    with pytest.raises(InputError, match="result: "):
        write_result(file, Result((), "", "", "", True, 1, 1, {"lr": float("nan")}))
    with pytest.raises(InputError, match="surrogates not allowed"):
        write_sft(file, [{"prompt": "\ud800"}])
    assert file.read_text() == "kept"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_sft(tmp_path / "link", [{"prompt": "é", "completion": "\n"}])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text("utf-8") == '{"prompt": "é", "completion": "\\n"}\n'


# Reading


def test_the_kinds_of_files(tmp_path):
    file = tmp_path / "file.json"
    who, what = Question("Who?", "She"), Question("A?", "B")
    file.write_text(json.dumps(DATASET))
    dataset = read_passages(file)
    assert dataset == [Passage("T", "A passage.", (who,)), Passage("T", "Another.", (what, what))]
    file.write_text(json.dumps(COMPLETIONS))
    assert read_passages(str(file)) == [
        Passage(p.title, p.context, p.questions, ("1. A.", ""), "Read:\n") for p in dataset
    ]
    file.write_text(json.dumps(RESULT))
    assert read_passages(file) == [Passage("T", "A passage.", (who,), ("1. A.",), "Read:\n")]
    assert read_result(file).articles[0].completions[0].questions[1] == Asked(1, "Who?", "She", "", "She.", False, True)


def test_fields_that_may_be_missing_or_null(tmp_path):
    file = tmp_path / "file.json"
    file.write_text(json.dumps([{**DATASET[0], "completions": None, "prompt": None}]))
    assert read_passages(file) == [Passage("T", "A passage.", (Question("Who?", "She"),))]
    file.write_text(changed("result", "articles", 0, "prompt"))
    assert read_passages(file)[0].prompt is None
    file.write_text(changed("completions", 0, "completions", value=[]))
    assert read_passages(file)[0].completions == ()


QUESTIONS = (0, "questions")
ROW = ("articles", 0, "completions", 0, "questions", 0)
# name: (text or bytes of the file, what the refusal says after the file's name)
BAD = {
    "empty": ("", "found an empty file"),
    "blank": (" \n", "found an empty file"),
    "no JSON": ("title: T", "not JSON: Expecting value: line 1 column 1"),
    "lines of JSON": (f"{json.dumps(DATASET[0])}\n" * 2, "not JSON: Extra data: line 2 column 1"),
    "truncated": (json.dumps(DATASET)[:-20], "not JSON: "),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + json.dumps(DATASET).encode(), "not JSON: Unexpected UTF-8 BOM"),
    "not UTF-8": (json.dumps(DATASET).replace("A passage", "Ä passage").encode("latin-1"), "bytes that are not UTF-8"),
    "binary": (bytes(range(256)), "bytes that are not UTF-8"),
    "compressed": (b"\x1f\x8b\x08\x00" + b"\x00" * 50, "bytes that are not UTF-8"),
    "nested deeply": ("[" * 10**5, "not JSON: "),
    "a huge number": (f"[{'9' * 5000}]", "not JSON: "),
    "NaN": (changed("dataset", 0, "title", value=float("nan")), "not JSON: NaN is no number"),
    "Infinity": (json.dumps([float("-inf")]), "not JSON: -Infinity is no number"),
    "a key twice": ('[{"title": "T", "title": "U"}]', "not JSON: the key 'title' twice"),
    "a number": ("3", "found int 3; accepted: a list of passages"),
    "null": ("null", "found nothing; accepted: a list of passages"),
    "text": ('"passages"', "found str 'passages'; accepted: a list of passages"),
    "an empty list": ("[]", r"found list \[\]; accepted: a list of passages, at least one"),
    "one record": (json.dumps(DATASET[0]), "found dict .*; accepted: a list of passages, .* or a result with articles"),
    "SQuAD's own": ('{"version": "1.1", "data": []}', "found dict .*; accepted: a list of passages"),
    "a record that is text": ('["T"]', r"\[0\]: found str 'T'; accepted: an object"),
    "a record that is null": (changed("dataset", 1, value=None), r"\[1\]: found nothing; accepted: an object"),
    "no title": (changed("dataset", 1, "title"), r"\[1\].title: found nothing; accepted: text that is not blank"),
    "no context": (changed("dataset", 1, "context"), r"\[1\].context: found nothing"),
    "no questions": (
        changed("dataset", 1, "questions"),
        r"\[1\].questions: found nothing; accepted: a list of objects",
    ),
    "a title of another type": (changed("dataset", 0, "title", value=5), r"\[0\].title: found int 5; accepted: text"),
    "a title that is null": (changed("dataset", 0, "title", value=None), r"\[0\].title: found nothing"),
    "an empty title": (
        changed("dataset", 0, "title", value=""),
        r"\[0\].title: found str ''; accepted: text that is not",
    ),
    "a blank context": (changed("dataset", 0, "context", value=" \n"), r"\[0\].context: found str ' \\n'"),
    "a context in parts": (changed("dataset", 0, "context", value=["A", "B"]), r"\[0\].context: found list"),
    "a lone surrogate": (changed("dataset", 0, "context", value="\ud800"), r"\[0\].context: .*lone surrogates"),
    "no question": (changed("dataset", 0, "questions", value=[]), r"\[0\].questions: found list \[\]; .* at least one"),
    "one question": (changed("dataset", 0, "questions", value={"question": "A?"}), r"\[0\].questions: found dict"),
    "a question that is text": (changed("dataset", *QUESTIONS, 0, value="Who?"), r"\[0\].questions\[0\]: found str"),
    "a question without an answer": (
        changed("dataset", *QUESTIONS, 0, "answer"),
        r"\[0\].questions\[0\].answer: found",
    ),
    "an answer without a question": (changed("dataset", *QUESTIONS, 0, "question"), r"\[0\].questions\[0\].question: "),
    "an empty answer": (changed("dataset", *QUESTIONS, 0, "answer", value=""), r"questions\[0\].answer: found str ''"),
    "an answer that is a number": (
        changed("dataset", *QUESTIONS, 0, "answer", value=50),
        r"\[0\].answer: found int 50",
    ),
    "answers": (
        changed("dataset", 1, "questions", 1, "answer", value=["B"]),
        r"\[1\].questions\[1\].answer: found list",
    ),
    "a passage twice": (json.dumps([*DATASET, DATASET[0]]), r"\[2\]: found the title and context of \[0\]"),
    "one completion": (changed("completions", 0, "completions", value="1. A."), r"\[0\].completions: found str"),
    "a completion that is none": (changed("completions", 0, "completions", 1, value=None), r"\[0\].completions\[1\]: "),
    "a completion of tokens": (changed("completions", 0, "completions", 0, value=[1]), r"completions\[0\]: found list"),
    "a blank prompt": (changed("completions", 1, "prompt", value=" "), r"\[1\].prompt: found str ' '"),
    "a prompt of messages": (changed("completions", 1, "prompt", value=[{}]), r"\[1\].prompt: found list"),
    "articles that are none": (changed("result", "articles", value={}), "result.articles: found dict"),
    "no articles": (changed("result", "articles", value=[]), r"result.articles: found list \[\]; .* at least one"),
    "an article without title": (
        changed("result", "articles", 0, "title"),
        r"result.articles\[0\].title: found nothing",
    ),
    "an article without completions": (changed("result", *ROW[:3], value=[]), r"articles\[0\].completions: found list"),
    "a completion without text": (changed("result", *ROW[:4], "text"), r"completions\[0\].text: found nothing"),
    "a completion without questions": (changed("result", *ROW[:5]), r"completions\[0\].questions: found nothing"),
    "no repeat": (changed("result", *ROW, "rep"), r"questions\[0\].rep: found nothing; accepted: an integer >= 0"),
    "a repeat that is true": (changed("result", *ROW, "rep", value=True), r"questions\[0\].rep: found bool True"),
    "a grade that is text": (
        changed("result", *ROW, "adapter_correct", value="yes"),
        r"adapter_correct: found str 'yes'",
    ),
    "a grade that is a share": (
        changed("result", *ROW, "baseline_correct", value=0.5),
        "baseline_correct: found float",
    ),
    "no answer": (changed("result", *ROW, "adapter_answer"), r"questions\[0\].adapter_answer: found nothing"),
    "differing questions": (
        changed("result", *ROW, "question", value="Why?"),
        r"articles\[0\]: found differing questions",
    ),
    "split_newlines as text": (changed("result", "split_newlines", value="yes"), "result.split_newlines: found str"),
    "k_completions missing": (changed("result", "k_completions"), "result.k_completions: found nothing"),
    "lora_params missing": (changed("result", "lora_params"), "result.lora_params: found nothing; accepted: an object"),
    "a model that is a number": (changed("result", "model", value=7), "result.model: found int 7"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, message = BAD[name]
    file = tmp_path / "data.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: .*{message}"):
        read_passages(file)


@pytest.mark.parametrize("kind", ["dataset", "completions"])
def test_passages_are_no_result(tmp_path, kind):
    (tmp_path / "data.json").write_text(json.dumps(KINDS[kind]))
    with pytest.raises(InputError, match=r"data\.json: found list .*; accepted: an object with articles"):
        read_result(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.json", "missing.json: missing"),
        ("directory", "directory: cannot be read: Is a directory; accepted: a file"),
        ("file/below", "below: cannot be read: Not a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("null\0", "path: found .*; accepted: the name of a file"),
        ("lone\udfff", "path: found .*; accepted: the name of a file"),
        (None, "path: found NoneType None; accepted: the name of a file"),
    ],
)
def test_paths_to_no_file(tmp_path, path, message):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("[]")
    with pytest.raises(InputError, match=message):
        read_passages(path if path is None else tmp_path / path)  # pyright: ignore[reportArgumentType]


ODD = st.sampled_from([None, True, 0, -1, 1.5, "", " ", "text", "\ud800", [], {}, [{}], ["a"], {"a": 1}, 10**400])
JSON = st.recursive(ODD | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["title", "context", "questions", "question", "answer", "completions", "articles", "text"]), inner
), max_leaves=10)  # fmt: skip


def places(value, path=()):
    """Paths to everything in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in inside:
        yield (*path, step)
        yield from places(inner, (*path, step))


@given(st.data())
def test_any_value_in_any_place(tmp_path_factory, data):
    """The file is read or refused by its name, whatever JSON is in it."""
    kind = data.draw(st.sampled_from(list(KINDS)))
    text = changed(kind, *data.draw(st.sampled_from(list(places(KINDS[kind])))), value=data.draw(JSON))
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(text)
    result = passages_or_refusal(file)
    if isinstance(result, InputError):
        assert str(result).startswith(f"{file}: ")
    else:
        assert result
        assert all(p.title and p.context and p.questions for p in result)


def passages_or_refusal(file: Path) -> list[Passage] | InputError:
    try:
        return read_passages(file)
    except InputError as error:
        return error
