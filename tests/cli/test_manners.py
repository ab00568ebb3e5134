"""What the command line does with a full disk, a reader that leaves, an interrupt, a log file; whose names it uses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch

from command import ROOT
from seal_engine import Engine, files
from seal_engine.cli.main import main
from seal_engine.tiny import MODEL

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
TRAIN = ["train", "--model", str(MODEL), "--rank", "2", "--epochs", "1"]


def command(*arguments):
    return [sys.executable, "-m", "seal_engine", *map(str, arguments)]


@pytest.fixture
def data(tmp_path):
    made = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in made:
        file.write_text("A line.\nAnother.\n")
    return made


def test_a_full_disk_is_one_line_and_its_job_fails_alone(data, tmp_path, monkeypatch, capsys):
    """safetensors has an error class of its own for it, which is no OSError."""

    def save(tensors, file, metadata):
        if file.parts[-2].endswith("a"):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        return whole(tensors, file, metadata)

    whole = files.save_file
    monkeypatch.setattr(files, "save_file", lambda tensors, file, metadata: save(tensors, file, metadata))
    monkeypatch.setattr(files.tempfile, "mkdtemp", named_after_the_directory(files.tempfile.mkdtemp))
    out = tmp_path / "out"
    assert main([*TRAIN, "--data", *map(str, data), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{out / 'a'}: cannot be written: No space left on device" in err
    assert not (out / "a").exists()
    assert (out / "b/adapter_model.safetensors").exists()


def named_after_the_directory(mkdtemp):
    names = iter("ab")
    return lambda prefix, dir: mkdtemp(prefix=prefix, suffix=next(names), dir=dir)


def test_a_disk_that_is_really_full(data, tmp_path):
    """A limit on the size of files, as a quota sets it."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)); "
    limit += "import sys; from seal_engine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*TRAIN, "--data", str(data[0]), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", limit, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot be written: File too large" in done.stderr


def test_a_reader_that_leaves_ends_the_program_quietly():
    plan = command("plan", "--model", MODEL, "--memory", "1GB", "--sequence-tokens", "50")
    with subprocess.Popen(plan, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + signal.SIGPIPE


def test_a_log_gets_lines_and_no_bar(data, tmp_path):
    slow = "import seal_engine.progress as p; p.LINE_SECONDS = 0.0; "
    slow += "import sys; from seal_engine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*TRAIN, "--data", *map(str, data), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", slow, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "\r" not in done.stderr
    assert "%|" not in done.stderr
    assert "Training: 2 of 2 jobs, 0 resident, " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("verb", ["train", "demo"])
def test_an_interrupt_says_what_goes_on(verb, data, tmp_path):
    arguments = {
        "train": [*TRAIN[:-1], "100000", "--data", data[0], "--out", tmp_path / "out"],
        "demo": ["demo", "--out", tmp_path / "run"],
    }[verb]
    process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    last = err.decode().splitlines()[-1]
    goes_on = "; the same command goes on with the run" if verb == "demo" else ""
    assert last == f"seal-engine: interrupted{goes_on}"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "--epochs", "0"], "--epochs"), (["train", "--rank", "0"], "--rank"),
        (["train", "--dropout", "2"], "--dropout"), (["train", "--learning-rate", "-1"], "--learning-rate"),
        (["train", "--targets", "nothing"], "--targets"), (["train", "--batch-size", "0"], "--batch-size"),
        (["generate", "--top-p", "0"], "--top-p"), (["generate", "--max-tokens", "0"], "--max-tokens"),
        (["run", "--epochs", "0"], "epochs"), (["run", "--rank", "0"], "rank"), (["run", "--targets", "no"], "targets"),
        (["run", "--policy-epochs", "0"], "policy_epochs"), (["run", "--policy-rank", "0"], "policy_rank"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_messages_name_what_was_typed(arguments, name, data, tmp_path, capsys):
    """--epochs, not num_epochs; lora.r is a field that no user of the command line has seen."""
    verb, *flags = arguments
    whole = {
        "train": [*TRAIN, "--data", str(data[0]), "--out", str(tmp_path / "out")],
        "generate": ["generate", "--model", str(MODEL), "--prompt", "a"],
        "run": ["run", "miniature", "--out", str(tmp_path / "run")],
    }[verb]
    assert main([*whole, *flags]) == 2
    err = capsys.readouterr().err
    assert f" {name}: " in err or f": {name}: " in err or err.startswith(f"seal-engine: {name}: ")


def test_a_models_own_sampling_defaults_are_used_where_asked(tmp_path, capsys):
    shutil.copytree(MODEL, tmp_path / "model")
    file = tmp_path / "model/generation_config.json"
    given = json.loads(file.read_text()) | {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    file.write_text(json.dumps(given))
    engine = Engine.from_pretrained(tmp_path / "model")
    assert engine.sampling_defaults() == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    run = ["generate", "--model", str(tmp_path / "model"), "--prompt", "Ann", "--max-tokens", "2"]
    assert main([*run, "--sampling-defaults", "model", "--temperature", "0"]) == 0
    assert "defaults: {'temperature': 0.6, 'top_p': 0.9, 'top_k': 20}" in capsys.readouterr().out
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert Engine.from_pretrained(tmp_path / "model").sampling_defaults() == {"temperature": 0.0}  # greedy
    file.write_text(json.dumps(given | {"repetition_penalty": 1.1, "min_p": 0.05}))
    defaults = Engine.from_pretrained(tmp_path / "model").sampling_defaults()
    assert (defaults["repetition_penalty"], defaults["min_p"]) == (1.1, 0.05)
    file.write_text(json.dumps(given | {"no_repeat_ngram_size": 3}))
    assert main([*run, "--sampling-defaults", "model"]) == 2
    assert "generation_config.json: no_repeat_ngram_size: found 3; accepted: 0" in capsys.readouterr().err
    assert main(run) == 0
