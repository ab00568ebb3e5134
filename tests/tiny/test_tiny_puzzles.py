"""The few-shot loop with the shipped puzzle miniature: it learns from rewards, and its page shows puzzles."""

from xml.etree import ElementTree

import pytest

from learning import learn_with_control
from seal_engine import Engine, runs
from seal_engine.cli.main import main
from seal_engine.domains.few_shot.arc import Example, Task
from seal_engine.domains.few_shot.puzzle_picture import FILE, OF_EACH, Answered, choose, draw, read_puzzles
from seal_engine.domains.few_shot.task import FewShotConfig
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.settings import make
from seal_engine.svg import standalone
from seal_engine.tiny import puzzle_demo
from seal_engine.tiny.puzzles import PUZZLE_MODEL

SMALL = ["--contexts=4", "--self-edits=3", "--rounds=1", "--keep-reward=0"]
GRID = ((1, 2), (3, 4))
SHARED = pytest.mark.xdist_group("small puzzle run")  # one worker makes the run that these tests read


@pytest.fixture(scope="module", autouse=True)
def few_held_out_puzzles():
    """A third of the held-out puzzles: enough for the pictures, and to tell the baselines apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puzzle_demo, "HELD_OUT_PUZZLES", 8)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a small run that the command has finished."""
    directory = tmp_path_factory.mktemp("puzzles") / "run"
    assert main(["run", "puzzle-miniature", "--out", str(directory), *SMALL, "--quiet"]) == 0
    return directory


def test_the_policy_learns_from_rewards_and_from_nothing_else(tmp_path, monkeypatch):
    """One round of two thirds of the demo's size, measured on twice as much; the control selects by others' rewards."""
    monkeypatch.setattr(puzzle_demo, "HELD_OUT_PUZZLES", 24)
    settings = {"self_edits": 4, "keep_fraction": 0.2, "held_out_self_edits": 2}
    found, blind = learn_with_control("puzzle-miniature", tmp_path, baselines=False, **settings)
    before, after = found["self-edits, before any round"], found["self-edits, after round 1"]
    assert after >= before + 0.1
    assert after > blind["self-edits, after round 1"]


@SHARED
def test_the_choice_of_a_directive_matters(finished):
    with Ledger.read(finished) as ledger:
        found = {row.name: row.mean for row in runs.rows(ledger)}
    assert found["best of two directives (oracle)"] > found["fixed directive"] > found["in context"]


@SHARED
def test_a_small_run(finished):
    """Its page shows puzzles; the same command again changes nothing; the choice shown is what the ledger says."""
    page = (finished / "report.html").read_bytes()
    assert b"Held-out puzzles: what is shown" in page
    picture = (finished / "puzzles.svg").read_bytes()
    assert main(["run", "puzzle-miniature", "--out", str(finished), *SMALL, "--quiet"]) == 0
    assert (finished / "report.html").read_bytes() == page
    assert (finished / "puzzles.svg").read_bytes() == picture
    engine = Engine.from_pretrained(PUZZLE_MODEL, device="cpu", dtype="float32")
    domain = puzzle_demo.make_puzzle_miniature(make(FewShotConfig, puzzle_demo.PUZZLE_MINIATURE), engine)
    with Ledger.read(finished) as ledger:
        chosen = choose(domain, ledger)
        trials = {t.context: t for t in ledger.trials(0, "evaluation 1, self-edits")}
    assert 0 < len(chosen) <= 4 * OF_EACH
    assert draw(read_puzzles(finished / FILE)) == draw(chosen)
    for one in chosen:
        assert list(one.elected) == ["in context", "before any round", "after round 1"]
        grades = trials[f"held out {one.task.name}"].grades  # none where the self-edit was refused
        assert (one.elected["after round 1"] == one.task.tests[0].output) == bool(grades and grades[0])


def test_grids_of_all_kinds_are_drawn():
    """Large ones, none at all, and puzzles with fewer demonstrations than others."""
    wide = tuple(tuple((r + c) % 10 for c in range(30)) for r in range(20))
    puzzles = [
        Answered(Task("$one$ 1", (Example(GRID, GRID),) * 3, (Example(GRID, GRID),)), {"in context": GRID}),
        Answered(Task("two 2", (Example(wide, GRID),), (Example(GRID, wide),)), {"in context": None}),
    ]
    ElementTree.fromstring(standalone(draw(puzzles)))
    assert "✓ in context" in draw(puzzles)
    assert "✗ in context" in draw(puzzles)
    for before, after, outcome in ((0, 1, "solved only after training"), (1, 0, "solved before, lost in training"),
                                   (1, 1, "solved before and after"), (0, 0, "not solved")):  # fmt: skip
        grids = [GRID if right else None for right in (before, after)]
        elected = dict(zip(("before any round", "after round 1"), grids, strict=True))
        assert f">1: {outcome}</text>" in draw([Answered(puzzles[0].task, elected)])
    assert "no grid" in draw(puzzles)
    assert draw(puzzles) == draw(puzzles)
    assert draw(puzzles[:1]) != draw([Answered(puzzles[0].task, {"in context": GRID[::-1]})])


@pytest.mark.parametrize("name", ["challenges", "held_out_challenges"])
def test_the_miniature_has_puzzles_of_its_own(tmp_path, capsys, name):
    (tmp_path / "arc.json").write_text("{}")
    flag = f"--{name.replace('_', '-')}"
    command = ["run", "puzzle-miniature", "--out", str(tmp_path / "run"), flag, str(tmp_path / "arc.json"), "--quiet"]
    assert main(command) == 2
    assert "the miniature has puzzles of its own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
