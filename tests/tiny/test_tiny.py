"""The whole loop with the shipped miniature: it learns from rewards, goes on when killed, and takes real data."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest

from command import fork_command, run_command
from learning import learn_with_control
from seal_engine import runs
from seal_engine.cli.main import main
from seal_engine.domains.knowledge.seal_files import read_passages, read_result
from seal_engine.loop.ledger import Ledger
from seal_engine.tiny import MODEL
from seal_engine.types import InputError

ROOT = Path(__file__).parents[2]
SQUAD = ROOT.parent / "shared/data/seal/squad_val_200.json"
SMALL = {"contexts": 4, "held_out_contexts": 3, "self_edits": 2, "rounds": 1}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def test_the_policy_learns_from_rewards_and_from_nothing_else(tmp_path):
    """One round of the demo's size; the control selects by the rewards of other self-edits."""
    found, blind = learn_with_control("miniature", tmp_path)
    before, after = found["self-edits, before any round"], found["self-edits, after round 1"]
    assert after >= before + 0.2
    assert blind["self-edits, after round 1"] <= before + 0.15
    assert after > found["passage only, 5 times"]
    assert found["passage in the prompt"] >= 0.9
    assert found["no adapter"] <= 0.2


def test_a_small_run(tmp_path, capsys):
    """The command's table, its last line, SEAL's files; the same command again changes nothing."""
    command = ["run", "miniature", "--out", str(tmp_path / "run"), *FLAGS, "--json"]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    printed = json.loads(out[-1])
    methods = [row["method"] for row in printed["table"]]
    assert methods[:4] == ["no adapter", "passage in the prompt", "passage only", "passage only, 5 times"]
    assert methods[-2:] == ["self-edits, before any round", "self-edits, after round 1"]
    assert any(line.startswith("seed 0, round 1: mean reward") for line in out)
    with Ledger.read(tmp_path / "run") as ledger:
        first = ledger.snapshot()
    result = read_result(tmp_path / "run/seed-0-round-1.json")
    assert len(result.articles) == 4
    assert all(len(article.completions) == 2 for article in result.articles)
    kept = (tmp_path / "run/seed-0-round-1-kept.jsonl").read_text().splitlines()
    assert len(kept) == len(first["policies"][0]["kept"])
    assert all(set(json.loads(line)) == {"prompt", "completion"} for line in kept)
    assert main(["resume", str(tmp_path / "run"), "--json", "--quiet"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == printed
    with Ledger.read(tmp_path / "run") as ledger:
        assert ledger.snapshot() == first


def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    """Killed three times while it trains, samples and writes; then resumed to the end."""
    command = ["run", "miniature", *FLAGS, "--rounds=2", "--keep-reward=0", "--quiet", "--out"]
    begun = time.monotonic()
    assert run_command(*command, tmp_path / "whole").wait() == 0
    seconds, draw = time.monotonic() - begun, random.Random(1)
    for _ in range(3):
        process = fork_command(*command, tmp_path / "run")
        process.join(seconds * draw.uniform(0.15, 0.45))  # without imports a whole run takes about 0.7 of the seconds
        process.kill()
        process.join()
    process = fork_command(*command, tmp_path / "run")
    process.join()
    assert process.exitcode == 0
    with Ledger.read(tmp_path / "run") as ledger, Ledger.read(tmp_path / "whole") as whole:
        assert ledger.snapshot() == whole.snapshot()
    adapters = [tmp_path / name / "policies/seed-0-round-2/adapter_model.safetensors" for name in ("run", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_settings_of_a_run_stay(tmp_path, capsys):
    assert main(["run", "miniature", "--out", str(tmp_path / "run"), *FLAGS, "--rounds=0", "--quiet"]) == 0
    assert (
        main(["run", "miniature", "--out", str(tmp_path / "run"), *FLAGS, "--rounds=0", "--top-p=0.5", "--quiet"]) == 2
    )
    assert "top_p: found 0.5; accepted: 1.0, with which the run began" in capsys.readouterr().err


def test_what_changes_no_result_may_change(tmp_path):
    command = ["run", "miniature", "--out", str(tmp_path / "run"), *FLAGS, "--rounds=0", "--quiet"]
    assert main(command) == 0
    assert main([*command, "--max-ungraded", "0.5", "--device", "cpu"]) == 0


def test_other_weights_are_another_run(tmp_path, capsys):
    shutil.copytree(MODEL, tmp_path / "model")
    command = ["run", "miniature", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), *FLAGS]
    assert main([*command, "--rounds=0", "--quiet"]) == 0
    weights = tmp_path / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main([*command, "--rounds=0", "--quiet"]) == 2
    assert "sha256.model.safetensors" in capsys.readouterr().err


def test_a_policy_update_that_fails_is_one_line(tmp_path, capsys):
    command = ["run", "miniature", "--out", str(tmp_path / "run"), *FLAGS, "--keep-reward=0", "--quiet"]
    assert main([*command, "--policy-learning-rate", "1e30"]) == 1
    err = capsys.readouterr().err
    assert "the policy's update failed" in err
    assert err.count("\n") == 1


def test_settings_from_a_file(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("rounds = 0\nheld_out_contexts = 2\nseeds = [3]\n")
    command = ["run", "miniature", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--json"]
    assert main([*command, "--held-out-contexts", "1", "--quiet"]) == 0
    with Ledger.read(tmp_path / "run") as ledger:
        assert ledger.config["seeds"] == [3]
        assert ledger.config["held_out_contexts"] == 1
    for text, message in (
        ("rounds = 'two'", "rounds: found str 'two'; accepted: int"),
        ("round = 2", "round: not a setting"),
        ("rounds = true", "rounds: found bool True"),
        ("seeds = ['a']", "seeds: found list ['a']; accepted: a list of int"),
        ("rounds =", "not TOML"),
    ):
        (tmp_path / "run.toml").write_text(text)
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_no_two_settings_share_a_name():
    for task in runs.TASKS:
        names = [name for kind in runs.configs(task) for name in kind.__dataclass_fields__]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "knowledge"], "--out"),
        (["run", "knowledge", "--out", "OUT"], "model: found ''"),
        (["run", "knowledge", "--model", str(MODEL), "--out", "OUT"], "data: found ''"),
        (["run", "knowledge", "--model", str(MODEL), "--data", "absent.json", "--out", "OUT"], "absent.json"),
        (["run", "miniature", "--contexts", "1000", "--out", "OUT"], "contexts: found 1000; accepted: at most"),
        (["run", "miniature", "--held-out-contexts", "10000", "--out", "OUT"], "held_out_contexts: found 10000"),
        (["run", "miniature", "--data", __file__, "--out", "OUT"], "data: found"),
        (["run", "miniature", "--writer", "nobody", "--out", "OUT"], "self_edit_source: found 'nobody'"),
        (["run", "miniature", "--grader", "model", "--out", "OUT"], "grader: found 'model'"),
        (["run", "miniature", "--chat", "--out", "OUT"], "chat_template"),
        (["run", "miniature", "--targets", "nonsense", "--out", "OUT"], "nonsense"),
        (["tiny", "train", "--out", "OUT", "--seed", "-1"], "--seed: found -1"),
        (["run", "miniature", "--keep", "none", "--out", "OUT"], "--keep"),
        (["run", "miniature", "--seeds", "a", "--out", "OUT"], "--seeds"),
        (["resume", "OUT"], "ledger.sqlite: missing"),
        (["select", "absent.json", "--out", "OUT"], "absent.json"),
        (["train", "--model", str(MODEL), "--data", "absent.txt", "--out", "OUT"], "absent.txt: missing"),
        (["generate", "--model", str(MODEL)], "--prompt: found none"),
        (["generate", "--model", "absent", "--prompt", "x"], "absent"),
    ],
)
def test_mistakes(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "OUT").exists(), "a run that was refused has claimed no directory"


def test_train_then_generate(tmp_path, capsys):
    """Two files, two adapters; each answers from its own."""
    for name, city in (("one", "Oslo"), ("two", "Lima")):
        lines = [f"Where does Ann Lee live? {city}", f"In which city is the home of Ann Lee? {city}"]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    data = [str(tmp_path / f"{name}.txt") for name in ("one", "two")]
    command = ["train", "--model", str(MODEL), "--dtype", "float32", "--data", *data, "--out", str(tmp_path / "out")]
    further = ["--rank", "16", "--alpha", "32", "--learning-rate", "3e-3", "--epochs", "15", "--append-eos", "--json"]
    assert main([*command, *further]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [entry["steps"] for entry in report["adapters"].values()] == [30, 30]
    adapters = [str(tmp_path / "out" / name) for name in ("one", "two")]
    ask = ["generate", "--model", str(MODEL), "--dtype", "float32", "--prompt", "Where does Ann Lee live?"]
    assert main([*ask, "--adapter", *adapters, "--temperature", "0", "--max-tokens", "3", "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert [o["outputs"][0]["text"].strip() for o in outputs] == ["Oslo", "Lima"]
    assert main([*command, *further]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.skipif(not SQUAD.exists(), reason="the published data is not here: shared/data/seal")
def test_real_passages(tmp_path):
    """Two published passages through the whole loop, by a model that can hardly read them."""
    settings = {
        "model": str(MODEL), "dtype": "float32", "data": str(SQUAD), "held_out_contexts": 1, "contexts": 1,
        "self_edits": 2, "repeats": 1, "rounds": 1, "max_tokens": 40, "epochs": 1, "answer_tokens": 4,
        "passage_copies": 1,
    }  # fmt: skip
    runs.start("knowledge", settings, tmp_path / "run", lambda line: None, progress=False)
    with Ledger.read(tmp_path / "run") as ledger:
        rows = runs.rows(ledger)
    assert [row.name for row in rows][-1] == "self-edits, after round 1"
    assert len(read_passages(SQUAD)) == 200
    assert len(read_result(tmp_path / "run/seed-0-round-1.json").articles) == 1


def test_a_run_directory_that_is_something_else(tmp_path):
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(InputError, match=r"found str 'letter\.txt'"):
        runs.start("miniature", SMALL, tmp_path, lambda line: None, progress=False)
