"""What a run may go on with: the same bytes wherever they lie, and settings that did not exist when it began."""

import json
import shutil
import sqlite3
from contextlib import closing

import pytest

from seal_engine.cli.main import main
from seal_engine.model.fingerprint import MODEL_FILES
from seal_engine.tiny import MODEL

FLAGS = ["--rounds=0", "--contexts=2", "--held-out-contexts=2", "--max-tokens=30", "--epochs=1", "--passage-copies=0"]


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """A directory with a model, a template, and a run that began with both."""
    home = tmp_path_factory.mktemp("began")
    shutil.copytree(MODEL, home / "model")
    (home / "ask.txt").write_text("{question}\n")
    assert main(command(home)) == 0
    return home


def command(home, *more):
    model, template = f"--model={home / 'model'}", f"--question-template={home / 'ask.txt'}"
    return ["run", "miniature", "--out", str(home / "run"), model, template, *FLAGS, "--quiet", *more]


@pytest.fixture
def home(began, tmp_path):
    """A copy, under another path: the paths that the run recorded are those of `began`."""
    return shutil.copytree(began, tmp_path / "moved")


def test_files_that_moved_are_the_same_files(home):
    assert main(command(home)) == 0
    assert main(["resume", str(home / "run"), "--quiet"]) == 0  # it knows the new paths


@pytest.mark.parametrize("name", MODEL_FILES)
def test_every_file_of_a_model_that_decides_numbers_is_watched(home, name, capsys):
    """Changed or, where there was none, added: a chat template decides every token of a chat."""
    file = home / "model" / name
    text = file.read_text() if file.exists() else "{}"
    file.write_text(text + "\n")
    assert main(command(home)) == 2
    assert f"config.sha256.{name}" in capsys.readouterr().err


def test_a_file_of_a_model_that_is_gone_is_noticed(home, capsys):
    (home / "model/generation_config.json").unlink()
    assert main(command(home)) == 2
    assert "config.sha256.generation_config.json" in capsys.readouterr().err


def test_another_template_is_another_run(home, capsys):
    (home / "ask.txt").write_text("Q: {question}\n")
    assert main(command(home)) == 2
    assert "config.sha256.question_template" in capsys.readouterr().err


def test_a_run_from_before_a_setting_existed_goes_on(home, capsys):
    """A key that its record lacks has the default; another value of it is another run."""
    with closing(sqlite3.connect(home / "run/ledger.sqlite", isolation_level=None)) as connection:
        config = json.loads(connection.execute("SELECT config FROM run").fetchone()[0])
        del config["keep_fraction"], config["endpoint_fields"], config["sha256"]["tokenizer_config.json"]
        connection.execute("UPDATE run SET config = ?", [json.dumps(config)])
    shutil.copytree(home / "run", home / "other")
    assert main(command(home)) == 0
    shutil.rmtree(home / "run")
    (home / "other").rename(home / "run")
    assert main(command(home, "--keep-fraction=0.5")) == 2
    assert "keep_fraction: found 0.5; accepted: 0.2" in capsys.readouterr().err


def test_a_finished_run_says_so_and_goes_on_with_more_rounds(home, capsys):
    """The command that the line names works: it adds the first round, and all is then finished with it."""
    said = [argument for argument in command(home) if argument != "--quiet"]
    assert main(said) == 0
    line = capsys.readouterr().out.splitlines()[0]
    go_on = f"to go on: seal-engine resume {home / 'run'} --rounds 1"
    assert line.startswith(f"{home / 'run'}: finished 20")
    assert line.endswith(f" UTC; nothing is run again. It has 0 rounds; {go_on}")
    assert main(["resume", str(home / "run"), "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "nothing is run again" not in printed
    assert "self-edits, after round 1" in printed
    assert sorted(path.name for path in (home / "run").glob("ledger.sqlite*")) == ["ledger.sqlite"]
    assert main(["resume", str(home / "run")]) == 0
    assert "It has 1 round; to go on: " in capsys.readouterr().out
    assert main(said) == 2
    assert "config.rounds: found 0; accepted: 1, with which the run began, or more" in capsys.readouterr().err
