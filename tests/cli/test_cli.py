"""The command line: in this process, and as a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import oracle
from seal_engine import LoraConfig
from seal_engine.cli.main import main
from seal_engine.cli.plan import memory
from seal_engine.model.config import ModelConfig
from seal_engine.plan import make_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return oracle.save(oracle.make_model("qwen2"), tmp_path_factory.mktemp("qwen2"))


def plan(model, *further):
    return ["plan", "--model", str(model), "--memory", "2GiB", "--sequence-tokens", "50", *further]


def process(*arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-W", "error", "-m", "seal_engine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_process(model):
    result = process(*plan(model, "--json"))
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout.splitlines()[-1])["adapters"] >= 1
    assert "adapters resident" in result.stdout


def test_a_mistake_in_a_process():
    result = process(*plan("absent"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("seal-engine: absent: not a directory")
    assert result.stderr.count("\n") == 1


def test_every_option_arrives(model, capsys):
    """The JSON object is the plan that the same arguments give in Python."""
    options = (
        *("--rank", "4", "--alpha", "2", "--targets", "k_proj,down_proj", "--adapters", "7", "--tokens", "300"),
        *("--dtype", "bfloat16", "--cpu", "--matrix-rate", "1e12", "--bandwidth", "3e10", "--recompute", "mlp"),
    )
    assert main(plan(model, *options, "--json")) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    made = make_plan(
        ModelConfig.from_directory(model), LoraConfig(r=4, target_modules=("k_proj", "down_proj")), 2 * 2**30, 50,
        adapters=7, tokens=300, dtype=torch.bfloat16, cpu=True, recompute="mlp", matrix_rate=1e12, bandwidth=3e10,
    )  # fmt: skip
    assert printed == {
        "memory_bytes": 2 * 2**30,
        **asdict(made),
        "step_seconds": made.step_seconds,
        "tokens_per_second": made.tokens / made.step_seconds,
    }
    changed = {}
    for name, value in (
        *(("rank", "8"), ("targets", "all-linear"), ("adapters", "6"), ("tokens", "200"), ("dtype", "float32")),
        *(("matrix-rate", "2e12"), ("bandwidth", "4e10"), ("recompute", "none"), ("sequence-tokens", "9")),
    ):
        assert main(plan(model, *options, f"--{name}", value, "--json")) == 0
        changed[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert changed[name] != printed, name


def test_a_config_alone_and_the_table(model, tmp_path, capsys):
    """The kinds of memory, in GiB, add up to what was given."""
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert main(plan(tmp_path / "config.json")) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("") + 1 :]
    memory_rows = table[1 : table.index("")]
    assert len(memory_rows) == 8
    assert sum(float(row.split()[-1]) for row in memory_rows) == pytest.approx(2, abs=0.04)
    rows = {line[:50].strip(): line.split()[-1] for line in lines if line}
    assert rows["recomputed in backward"] == "none"
    assert int(rows["adapters resident"]) > 100
    assert not lines[-1].startswith("{")


def test_help(capsys):
    for arguments in (["--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("139GiB", "FLOP/s", "bytes/s", "(default: 8192)", "as the config says"):
        assert words in " ".join(text.split())
    assert "None" not in text
    assert "False" not in text


MISTAKES = {
    "no verb": ([], "required: VERB"),
    "unknown verb": (["fly"], "invalid choice: 'fly'"),
    "nothing else": (["plan"], "required: --model, --memory, --sequence-tokens"),
    "unknown option": (["--speed", "1"], "--speed: unknown flag; see seal-engine plan --help"),
    "memory": (["--memory", "2QiB"], "argument --memory: found '2QiB'; accepted: a size such as 139GiB"),
    "negative memory": (["--memory=-1"], "argument --memory: found '-1'"),
    "too little memory": (["--memory", "1MiB"], "memory_bytes: found 1048576; accepted: at least"),
    "memory without end": (["--memory", "9" * 400], "argument --memory: found"),
    "rank 0": (["--rank", "0"], "lora.r: found 0"),
    "rank without end": (["--rank", str(10**30)], "lora.r: found 1000"),
    "rank no number": (["--rank", "x"], "argument --rank: invalid int value: 'x'"),
    "alpha": (["--alpha", "nan"], "lora.lora_alpha: found nan"),
    "targets": (["--targets", "q_proj,wq"], "lora.target_modules: found ['wq']"),
    "no targets": (["--targets", ""], "lora.target_modules: found ['']"),
    "sequence tokens": (["--sequence-tokens", "0"], "sequence_tokens: found 0"),
    "adapters": (["--adapters", "0"], "adapters: found 0"),
    "tokens": (["--tokens", "-5"], "tokens: found -5"),
    "dtype": (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "recompute": (["--recompute", "all"], "argument --recompute: invalid choice"),
    "matrix rate": (["--matrix-rate", "0"], "matrix_rate: found 0.0"),
    "bandwidth": (["--bandwidth", "inf"], "bandwidth: found inf"),
    "no such config": (["--model", "absent/config.json"], "absent/config.json: missing"),
}


@pytest.mark.parametrize("label", MISTAKES)
def test_mistakes(model, label, capsys):
    """One line on stderr that names the argument, status 2, nothing on stdout."""
    arguments, message = MISTAKES[label]
    whole = arguments if label in ("no verb", "unknown verb", "nothing else") else plan(model, *arguments)
    assert main(whole) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("seal-engine: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_sizes():
    sizes = {
        "0": 0, "1000": 1000, "5B": 5, "1k": 1024, "2KiB": 2048, "2kb": 2000, "1.5MiB": 3 * 2**19,
        "139GiB": 139 * 2**30,
        "80GB": 80 * 10**9, " 80 GB ": 80 * 10**9, "1T": 2**40, "3TB": 3 * 10**12,
    }  # fmt: skip
    assert {text: memory(text) for text in sizes} == sizes
