"""ARC's files in: the published ones, every kind of bad file by name, and grids to text and back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_engine import InputError
from seal_engine.domains.few_shot.arc import Example, GridText, GridTextError, Task, read_tasks

SHARED = Path(__file__).parents[3] / "shared/data/arc"
published = pytest.mark.skipif(not SHARED.is_dir(), reason="the published files are not on this machine")
SETS = {"training": (12, 13), "evaluation": (10, 11)}  # tasks and tests of the filtered sets

FIRST = {"train": [{"input": [[1, 2]], "output": [[2, 1]]}], "test": [{"input": [[3], [4]]}, {"input": [[5]]}]}
SECOND = {"train": [{"input": [[0]], "output": [[9]]}] * 2, "test": [{"input": [[1]], "output": [[8]]}], "name": "x"}
CHALLENGES = {"first": FIRST, "second": SECOND}
SOLUTIONS = {"first": [[[4], [3]], [[5]]], "second": [[[8]]], "third": "not ours"}
TASK = Task("first", (Example(((1, 2),), ((2, 1),)),), (Example(((3,), (4,)), None), Example(((5,),), None)))


def write(directory: Path, document: Any, name: str = "challenges.json") -> Path:
    (directory / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return directory / name


def changed(document: Any, *path, value: Any = ...) -> Any:
    """The document with one value in place of another, or without it."""
    document = json.loads(json.dumps(document))
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


@published
def test_published_training_tasks():
    tasks = read_tasks(SHARED / "arc-agi_training_challenges.json", SHARED / "arc-agi_training_solutions.json")
    assert len(tasks) == 400
    assert sum(len(task.train) for task in tasks) == 1302
    assert sum(len(task.tests) for task in tasks) == 416
    assert max(len(task.tests) for task in tasks) == 3
    assert all(test.output is not None for task in tasks for test in task.tests)
    assert tasks[0].name == "007bbfb7"
    assert tasks[0].train[0].input == ((0, 7, 7), (7, 7, 7), (0, 7, 7))


@published
@pytest.mark.parametrize("name", SETS)
def test_published_filtered_sets(name):
    (challenges,) = SHARED.glob(f"arc-agi_{name}_challenges_filtered*.json")
    (solutions,) = SHARED.glob(f"arc-agi_{name}_solutions_filtered*.json")
    tasks = read_tasks(challenges, str(solutions))
    assert (len(tasks), sum(len(task.tests) for task in tasks)) == SETS[name]
    assert all(test.output is None for task in read_tasks(challenges) for test in task.tests)
    if name == "training":  # its solutions are among those of all training tasks, too
        assert read_tasks(challenges, SHARED / "arc-agi_training_solutions.json") == tasks


def test_the_kinds_of_files(tmp_path):
    challenges = write(tmp_path, CHALLENGES)
    first, second = read_tasks(challenges)
    assert first == TASK
    assert second.tests == (Example(((1,),), ((8,),)),)
    assert len(second.train) == 2
    solved, same = read_tasks(str(challenges), write(tmp_path, SOLUTIONS, "solutions.json"))
    assert solved.tests == (Example(((3,), (4,)), ((4,), (3,))), Example(((5,),), ((5,),)))
    assert solved.train == first.train
    assert same == second
    assert read_tasks(write(tmp_path, FIRST, "first.json")) == [TASK]


def test_a_directory_of_tasks(tmp_path):
    write(tmp_path, SECOND, "second.json")
    write(tmp_path, FIRST, "first.json")
    (tmp_path / "README.md").write_text("no task")
    assert [task.name for task in read_tasks(tmp_path)] == ["first", "second"]
    write(tmp_path, {"second": FIRST}, "third.json")
    with pytest.raises(InputError, match=r"found the task second twice; accepted: each name once"):
        read_tasks(tmp_path)


def test_a_directory_without_tasks(tmp_path):
    with pytest.raises(InputError, match=r"found no JSON file in this directory"):
        read_tasks(tmp_path)


def test_limits():
    largest = tuple((0,) * 30 for _ in range(30))
    assert Task("t", (), (Example(largest, ((0,),)),)).within_limits
    assert not Task("t", (), (Example(largest, (*largest, (0,) * 30)),)).within_limits
    assert not Task("t", (Example(((0,) * 31,), ((0,),)),), (Example(largest, None),)).within_limits


ROW = ("first", "train", 0, "input", 0)
# name: (what is in the file, what the refusal says after the file's name)
BAD = {
    "empty": ("", "found an empty file"),
    "no JSON": ("train: []", "not JSON: "),
    "truncated": (json.dumps(CHALLENGES)[:-9], "not JSON: "),
    "NaN": (changed(CHALLENGES, *ROW, 0, value=float("nan")), "not JSON: NaN is no number"),
    "a task twice": ('{"a": {}, "a": {}}', "not JSON: the key 'a' twice"),
    "nested deeply": ("[" * 10**5, "not JSON: "),
    "null": ("null", "found nothing; accepted: an object of tasks by name, or one task with train and test"),
    "a list": ([FIRST], "found list .*; accepted: an object of tasks"),
    "no task": ({}, "found dict {}; accepted: an object of tasks"),
    "a task that is a list": ({"first": []}, r"first: found list \[\]; accepted: an object"),
    "solutions": (SOLUTIONS, "first: found list .*; accepted: an object"),
    "no demonstrations": (changed(CHALLENGES, "first", "train"), r"first\.train: found nothing; .* at least one"),
    "an empty train": (changed(CHALLENGES, "first", "train", value=[]), r"first\.train: found list \[\]"),
    "no tests": (changed(CHALLENGES, "second", "test", value=[]), r"second\.test: found list \[\]; .* at least one"),
    "one task without tests": (changed(FIRST, "test"), r"challenges\.test: found nothing; accepted: a list of objects"),
    "one task without train": (
        changed(FIRST, "train"),
        r"challenges\.train: found nothing; accepted: a list of objects",
    ),
    "an example that is a list": (
        changed(CHALLENGES, "first", "test", 1, value=[[5]]),
        r"first\.test\[1\]: found list",
    ),
    "no input": (changed(CHALLENGES, "first", "test", 1, "input"), r"first\.test\[1\]\.input: found nothing"),
    "no output": (changed(CHALLENGES, "first", "train", 0, "output"), r"first\.train\[0\]\.output: found nothing"),
    "a grid that is text": (changed(CHALLENGES, *ROW[:-1], value="12"), r"train\[0\]\.input: found str '12'; .* rows"),
    "an empty grid": (changed(CHALLENGES, *ROW[:-1], value=[]), r"input: found list \[\]; accepted: 1 to 30 rows"),
    "a flat grid": (changed(CHALLENGES, *ROW, value=1), r"input\[0\]: found int 1; accepted: a row of 1 to 30 colours"),
    "an empty row": (changed(CHALLENGES, *ROW, value=[]), r"input\[0\]: found list \[\]; accepted: a row"),
    "31 rows": (changed(CHALLENGES, *ROW[:-1], value=[[0]] * 31), "input: found 31 rows; accepted: 1 to 30"),
    "31 columns": (changed(CHALLENGES, *ROW, value=[0] * 31), r"input\[0\]: found 31 columns; accepted: 1 to 30 rows"),
    "ragged": (
        changed(CHALLENGES, "first", "test", 0, "input", 1, value=[4, 4]),
        r"first\.test\[0\]\.input\[1\]: found 2 columns; accepted: 1, as the first row has",
    ),
    "the colour 10": (changed(CHALLENGES, *ROW, 1, value=10), r"input\[0\]\[1\]: found int 10; .* an integer 0 to 9"),
    "the colour -1": (changed(CHALLENGES, *ROW, 1, value=-1), r"input\[0\]\[1\]: found int -1; .* an integer 0 to 9"),
    "the colour 1.0": (changed(CHALLENGES, *ROW, 0, value=1.0), r"input\[0\]\[0\]: found float 1.0; .* an integer"),
    "the colour true": (changed(CHALLENGES, *ROW, 0, value=True), r"input\[0\]\[0\]: found bool True; .* an integer"),
    "no colour": (changed(CHALLENGES, *ROW, 0, value=None), r"input\[0\]\[0\]: found nothing; accepted: a colour"),
    "a colour that is text": (changed(CHALLENGES, *ROW, 0, value="1"), r"input\[0\]\[0\]: found str '1'"),
    "a bad output of a test": (
        changed(CHALLENGES, "second", "test", 0, "output", value=[[11]]),
        r"second\.test\[0\]\.output\[0\]\[0\]: found int 11",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, message = BAD[name]
    file = write(tmp_path, content)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: .*{message}"):
        read_tasks(file)


BAD_SOLUTIONS = {
    "not an object": ([], r"found list \[\]; accepted: an object"),
    "a task missing": (changed(SOLUTIONS, "first"), "first: found nothing; accepted: 2 grids, one for each test"),
    "a grid missing": (changed(SOLUTIONS, "first", 1), "first: found 1 grids; accepted: 2 grids"),
    "a grid too many": (changed(SOLUTIONS, "second", value=[[[8]]] * 2), "second: found 2 grids; accepted: 1 grids"),
    "a bad grid": (
        changed(SOLUTIONS, "first", 1, value=[[1, 2], [3]]),
        r"first\[1\]\[1\]: found 1 columns; accepted: 2",
    ),
    "a bad colour": (changed(SOLUTIONS, "first", 0, 1, 0, value=12), r"first\[0\]\[1\]\[0\]: found int 12"),
    "another one": (
        changed(SOLUTIONS, "second", 0, value=[[7]]),
        r"second\[0\]: found another grid than the test",
    ),
}


@pytest.mark.parametrize("name", BAD_SOLUTIONS)
def test_bad_solutions(tmp_path, name):
    content, message = BAD_SOLUTIONS[name]
    file = write(tmp_path, content, "solutions.json")
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: {message}"):
        read_tasks(write(tmp_path, CHALLENGES), file)


@pytest.mark.parametrize("path", ["missing.json", "x" * 300, "null\0", None])
def test_paths_to_no_file(tmp_path, path):
    with pytest.raises(InputError):
        read_tasks(path if path is None else tmp_path / path)  # pyright: ignore[reportArgumentType]


ODD = st.sampled_from([None, True, -1, 10, 1.5, "", "0", [], {}, [[]], [[0], [0, 1]], [[0]], 10**400])


def places(value, path=()):
    """Paths to everything in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in inside:
        yield (*path, step)
        yield from places(inner, (*path, step))


@given(place=st.sampled_from(list(places(CHALLENGES))), value=ODD)
def test_any_value_in_any_place(tmp_path_factory, place, value):
    """The file is read, or refused by its name."""
    file = write(tmp_path_factory.getbasetemp(), changed(CHALLENGES, *place, value=value), "any.json")
    try:
        tasks = read_tasks(file)
    except InputError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017
    else:
        assert all(task.train and task.tests and task.within_limits for task in tasks)


# Grids as text

COLOUR = st.integers(0, 9)
GRIDS = st.integers(1, 30).flatmap(
    lambda columns: st.lists(st.tuples(*[COLOUR] * columns), min_size=1, max_size=30).map(tuple)
)
FORMS = ["[[0, 1], [2, 3]]", "[[0,1],[2,3]]", "01\n23", "0 1 / 2 3", "<01|23>", "row 0,1;2,3 end", "0 1\n2 3\n"]


@pytest.mark.parametrize("form", FORMS)
def test_a_grid_as_text(form):
    assert GridText(form).write(((0, 1), (2, 3))) == form
    assert GridText(form).read(form) == ((0, 1), (2, 3))


@given(grid=GRIDS, form=st.sampled_from(FORMS))
def test_any_grid_is_read_back(grid, form):
    assert GridText(form).read(GridText(form).write(grid)) == grid


@given(text=st.text(alphabet="[], 0123456789\n-.a", max_size=30))
def test_what_is_read_is_what_is_written(text):
    form = GridText(FORMS[0])
    try:
        grid = form.read(text)
    except GridTextError:
        return
    assert form.write(grid) == text


@pytest.mark.parametrize("text", ["[[0,1],[2,3]]", "[[0, 1],[2, 3]] ", " [ [0,1],\n  [2,3] ]\n", "[[0 , 1] , [2 , 3]]"])
def test_any_spelling_of_json_is_a_grid(text):
    """A model that writes JSON in its own way has the right grid; a template that is no JSON is taken literally."""
    assert GridText("[[0, 1], [2, 3]]").read(text) == ((0, 1), (2, 3))
    with pytest.raises(GridTextError):
        GridText("0 1\n2 3").read(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "found str ''; accepted: a grid written like"),
        ("[]", "accepted: a grid written like"),
        ("[[]]", "accepted: a grid written like"),
        ("[[0, 1], [2, 3]", "accepted: a grid written like"),
        ("[[0, 10]]", "accepted: a grid written like"),
        ("[[-1]]", "accepted: a grid written like"),
        ("[[1.0]]", "accepted: a grid written like"),
        ("[[٣]]", "accepted: a grid written like"),
        ("[[0], [1]] [[0]]", "accepted: a grid written like"),
        ("[[0, 1], [2]]", r"found rows of \[1, 2\] colours; accepted: of one length"),
        ("[[" + ", ".join("0" * 31) + "]]", "found 1 rows of 31; accepted: 1 to 30 rows of 1 to 30 colours"),
        ("[[" + "], [".join("0" * 31) + "]]", "found 31 rows of 1"),
    ],
)
def test_text_that_is_no_grid(text, reason):
    with pytest.raises(GridTextError, match=reason):
        GridText(FORMS[0]).read(text)


@pytest.mark.parametrize(
    "form", ["", "0123", "01\n23 4", "0 1 2 3", "0 1\n2,3", "0, 1 2, 3x0", "3 2\n1 0", "0\n\n1\n2\n\n3"]
)
def test_templates_that_are_no_form_of_grids(form):
    with pytest.raises(InputError, match=r"^grid template: found str .*; accepted: "):
        GridText(form)
