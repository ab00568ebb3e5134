"""What a person sees after a mistake: one line that says what was meant; and how soon help is there."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

import seal_engine
from command import ROOT
from seal_engine.cli.main import VERBS, main
from seal_engine.tiny import MODEL

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def error(capsys, *arguments):
    """The one line that a mistake gives, status 2 and nothing on stdout."""
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("seal-engine: ").rstrip("\n")


def test_version(capsys):
    """The one number of the package, which pyproject.toml reads from there."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"seal-engine {seal_engine.__version__}\n"
    assert 'version = { attr = "seal_engine.__version__" }' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "knowledge", "--out", "x", "--rouds", "3"], "--rouds: unknown flag; did you mean --rounds? See"),
        (["run", "knowledge", "--rouds=3"], "--rouds: unknown flag; did you mean --rounds? See"),
        (["demo", "--seed", "2"], "--seed: unknown flag; did you mean --seeds? See"),
        (["demo", "--speed-of-light"], "--speed-of-light: unknown flag; see"),
        (["resume", "runs/a", "runs/b"], "runs/b: unknown argument; see"),
    ],
    ids=["typo", "typo before what is missing", "abbreviation", "nothing similar", "argument too many"],
)
def test_flags(arguments, message, capsys):
    """The verb's own help is named, and the flag that is most like the typo; --seed is no abbreviation of --seeds."""
    verb = "run knowledge" if arguments[0] == "run" else arguments[0]
    assert error(capsys, *arguments) == f"{message} seal-engine {verb} --help"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demmo"], "did you mean demo? See seal-engine --help"),
        (["run", "knowlege"], "did you mean knowledge? See seal-engine run --help"),
        (["plan", "--recompute", "layers"], "did you mean layer? See seal-engine plan --help"),
    ],
    ids=["verb", "task", "choice"],
)
def test_names(arguments, message, capsys):
    assert error(capsys, *arguments).endswith(message)


def test_a_text_that_looks_like_a_flag_is_no_mistake(capsys):
    """argparse takes what holds a space for a value, and everything after --."""
    assert main(["generate", "--model", str(MODEL), "--max-tokens", "1", "--prompt", "--not a=flag"]) == 0
    assert "--not a=flag" in capsys.readouterr().out
    assert "--absent/ledger.sqlite: missing" in error(capsys, "report", "--", "--absent")


def test_a_missing_key_names_the_keys_that_are_there(tmp_path, capsys):
    """Of a passage, of a line of training data, and of a file of settings, each with a typo."""
    run = ["run", "knowledge", "--model", MODEL, "--out", tmp_path / "run"]
    data = tmp_path / "data.json"
    data.write_text('[{"titel": "Ann", "context": "b", "questions": [{"question": "c", "answer": "d"}]}]')
    message = error(capsys, *run, "--data", data)
    assert message.startswith(f"{data}: [0].title: found nothing; accepted: text that is not blank; ")
    assert message.endswith("; the keys there: 'titel', 'context', 'questions'; did you mean titel?")
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"txt": "Ann sails."}')
    message = error(capsys, "train", "--model", MODEL, "--data", lines, "--out", tmp_path / "out")
    assert " with the keys 'txt'; accepted: a text" in message
    settings = tmp_path / "run.toml"
    settings.write_text("seads = [0]")
    assert "seads: not a setting; did you mean seeds?" in error(capsys, *run, "--config", settings)


PASSAGES = [
    {"title": f"{i}", "context": f"Ann has {i} dogs.", "questions": [{"question": "How many?", "answer": f"{i}"}]}
    for i in range(6)
]


@pytest.mark.parametrize(
    ("flags", "end"),
    [
        ([], "6 passages: try --contexts 4 --held-out-contexts 2"),
        (["--contexts", "3"], "6 passages: try --contexts 3 --held-out-contexts 2"),
        (["--held-out-contexts", "1"], "6 passages: try --contexts 4 --held-out-contexts 1"),
        (["--held-out-data"], "6 passages and 6 held out: try --contexts 6 --held-out-contexts 6"),
    ],
    ids=["both too large", "held out too large", "contexts too large", "a file of their own"],
)
def test_sizes_come_together_with_flags_that_work(flags, end, tmp_path, capsys):
    """The published 50 and 50 are more than six passages; two thirds to learn and a third to measure are not.

    With the flags the message is another one: of the model, which is read after the sizes.
    """
    data = tmp_path / "data.json"
    data.write_text(json.dumps(PASSAGES))
    run = ["run", "knowledge", "--model", tmp_path / "absent", "--data", data, "--out", tmp_path / "run", *flags]
    if flags == ["--held-out-data"]:
        run.append(data)
    message = error(capsys, *run)
    assert message.startswith("contexts: found ")
    assert message.endswith(end)
    assert error(capsys, *run, *end.partition("try ")[2].split()).startswith(f"{tmp_path / 'absent'}: not a directory")


@pytest.fixture
def trained(tmp_path):
    """Two files to train on, where their adapters go, and the command."""
    files, out = [tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out"
    for file in files:
        file.write_text("A line.\nAnother.\n")
    command = ["train", "--model", MODEL, "--rank", "2", "--epochs", "2", "--out", out, "--data"]
    return files, out, list(map(str, command))


def test_train_says_where_adapters_went_and_how_the_loss_fell(trained, capsys):
    files, out, command = trained
    assert main([*command, str(files[0]), "--json"]) == 0
    printed = capsys.readouterr()
    line, report = printed.out.splitlines()
    values = json.loads(report)["adapters"][str(files[0])]
    assert line.endswith(f", loss {values['first_loss']:.4f} to {values['loss']:.4f}; adapter in {out / 'a'}")
    assert values["adapter"] == str(out / "a")
    assert (out / "a/adapter_config.json").exists()
    assert values["loss"] < values["first_loss"]
    assert printed.err == ""


def test_train_warns_when_nothing_was_learned(trained, capsys):
    """A learning rate that changes no weight leaves the loss of each line what it was: one file of equal lines."""
    files, _, command = trained
    files[0].write_text("A line.\nA line.\n")
    assert main([*command, str(files[0]), "--learning-rate", "1e-30"]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"seal-engine: warning: {files[0]}: nothing was learned: loss ")
    assert err.count("\n") == 1


def test_generate_finds_the_only_adapter_one_level_down_or_lists_them(trained, capsys):
    files, out, command = trained
    generate = ["generate", "--model", str(MODEL), "--prompt", "A", "--max-tokens", "1", "--adapter", str(out)]
    assert main([*command, str(files[0])]) == 0
    capsys.readouterr()
    assert main(generate) == 0
    assert f"[{out / 'a'}]" in capsys.readouterr().out
    shutil.copytree(out / "a", out / "b")
    message = error(capsys, *generate)
    assert message == f"--adapter: found 2 adapters in {out}; accepted: one of {out / 'a'}, {out / 'b'}"


@pytest.mark.parametrize(
    ("flags", "assumed"),
    [
        ([], "assumed: GPU (no --cpu), base weights in bfloat16 (config.json)"),
        (["--cpu", "--dtype", "float32"], "assumed: CPU (--cpu), base weights in float32 (--dtype)"),
        (
            ["--quantize", "nf4"],
            "assumed: GPU (no --cpu), base weights in bfloat16 (config.json), linears in nf4 (--quantize)",
        ),
    ],
    ids=["by default", "flags", "quantised"],
)
def test_plan_puts_the_answer_first_and_says_what_it_assumed(flags, assumed, capsys):
    """The shipped model's config.json names bfloat16."""
    plan = ["plan", "--model", str(MODEL), "--memory", "1GiB", "--sequence-tokens", "50", "--adapters", "3", *flags]
    assert main(plan) == 0
    printed = capsys.readouterr()
    answer, assumption = printed.out.splitlines()[:2]
    assert answer.startswith("3 adapters in training at once, ")
    assert assumption == assumed
    assert printed.err == ""


def test_plan_warns_when_sampling_has_no_room(capsys):
    """As many adapters as fit leave less than an adapter's state, here less than the K/V of a thousand tokens."""
    assert main(["plan", "--model", str(MODEL), "--memory", "1GiB", "--sequence-tokens", "8192"]) == 0
    assert capsys.readouterr().err.startswith("seal-engine: warning: no room for sampling: ")


@pytest.mark.parametrize("name", VERBS)
def test_summaries_are_those_of_the_functions(name):
    """Help is there without the modules of the verbs, so it has their first lines a second time."""
    module, summary = VERBS[name]
    assert getattr(__import__(f"seal_engine.cli.{module}", fromlist=[name]), name).__doc__.split("\n")[0] == summary


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demmo"]], ids=" ".join)
def test_torch_is_not_imported_before_it_is_needed(arguments, record_property, capsys):
    """What takes seconds to import is not there when help has been printed; the time is reported, as others may want
    the cores: 0.1 s alone, and 2 s with torch."""
    code = f"import sys; from seal_engine.cli.main import main\ntry: main({arguments})\n"
    code += "finally: print(sorted({'torch', 'numpy', 'triton'} & sys.modules.keys()), file=sys.stderr)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.stderr.splitlines()[-1] == "[]"
    record_property("seconds", seconds)
    with capsys.disabled():
        print(f" {arguments[0]} in {seconds:.2f} s ", end="")
