"""The verbs around the loop: demo, run, resume, report, select, tiny."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from seal_engine import runs
from seal_engine.domains.knowledge.results import select as select_kept
from seal_engine.domains.knowledge.seal_files import read_result, write_sft
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.settings import add_flags, read_toml
from seal_engine.progress import write_line
from seal_engine.real.demo import smollm2
from seal_engine.report.compare import compare, comparison, comparison_table, write_comparison
from seal_engine.report.page import write_report
from seal_engine.tiny.continual_demo import POLICY_ROUNDS
from seal_engine.tiny.pretrain import Recipe, train_tiny
from seal_engine.tiny.pretrain_puzzles import SHAPE, PuzzleRecipe, train_puzzle_model
from seal_engine.types import InputError, require


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", help="no progress bars, and no text but what --json gives", action="store_true")
    parser.add_argument("--json", help="add one JSON object as the last line of stdout", action="store_true")


def _shown(options: argparse.Namespace) -> tuple[Callable[[str], None], bool]:
    """Where lines go, and whether there are bars."""
    return (lambda _: None) if options.quiet else write_line, not options.quiet


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", default="knowledge", choices=sorted(DEMOS), help="(default: %(default)s)")
    parser.add_argument("--out", help="directory of the run (default: runs/demo-TASK)", metavar="DIR")
    text = "how many seeds to run (default: 3; of continual and real, 1)"
    parser.add_argument("--seeds", help=text, type=int, default=0, metavar="N")
    _run_arguments(parser)


def demo(options: argparse.Namespace) -> None:
    """Watch a small model learn to write its own training data: minutes on a CPU, no download."""
    count = options.seeds or DEMO_SEEDS[options.task]
    require(count >= 1, "--seeds", options.seeds, "an integer >= 1")
    values: dict[str, Any] = {"seeds": tuple(range(count))}
    if options.task == "real":
        values["model"] = smollm2()
    out = options.out or f"runs/demo-{options.task}"
    if options.task == "continual":
        policy = runs.start(DEMOS["knowledge"], POLICY_ROUNDS, f"{out}-policy", *_shown(options))
        rounds = range(1, POLICY_ROUNDS["rounds"] + 1)
        values |= {"policies": tuple(str(policy / "policies" / f"seed-0-round-{r}") for r in rounds)}
        values |= {"methods": DEMO_METHODS}
    _finish(runs.start(DEMOS[options.task], values, out, *_shown(options)), options)


DEMOS = {
    "few-shot": "puzzle-miniature",
    "knowledge": "miniature",
    "continual": "continual-miniature",
    "real": "real-model",
}
DEMO_SEEDS = {"few-shot": 3, "knowledge": 3, "continual": 1, "real": 1}
DEMO_METHODS = ("merge", "replay", "distil", "gate", "null-space", "consolidate", "bank", "oracle", "joint")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in runs.TASKS.items():
        usage = "%(prog)s --out DIR [--config FILE.toml] [settings]"
        sub = tasks.add_parser(name, help=task.summary, description=task.summary, usage=usage)
        sub.add_argument("--out", help="directory of the run; an existing run is resumed", required=True, metavar="DIR")
        sub.add_argument("--config", help="TOML file of settings; flags override it", metavar="FILE")
        _run_arguments(sub)
        for kind in runs.configs(name):
            add_flags(sub, kind, (kind.__doc__ or "").partition(".")[0], task.defaults)


def run(options: argparse.Namespace) -> None:
    """Run the loop on a task: self-edits, adapters, questions, a better policy."""
    kinds = runs.configs(options.task)
    values = read_toml(options.config, kinds) if options.config else {}
    names = {name for kind in kinds for name in kind.__dataclass_fields__}
    values |= {name: value for name, value in vars(options).items() if name in names}
    _finish(runs.start(options.task, values, options.out, *_shown(options)), options)


def resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="directory of a run that was interrupted", metavar="DIR")
    more = "rounds of the whole run, at least as many as it began with: a finished run goes on with those it lacks"
    parser.add_argument("--rounds", help=more, type=int, metavar="N")
    _run_arguments(parser)


def resume(options: argparse.Namespace) -> None:
    """Resume a run that was interrupted, or add rounds to one that is finished."""
    _finish(runs.resume(options.directory, *_shown(options), options.rounds), options)


def _finish(directory: Path, options: argparse.Namespace) -> None:
    """Write the report, and print what the run came to."""
    page = write_report(directory)
    with Ledger.read(directory) as ledger:
        shown, rows = runs.summary(ledger)
        if not options.quiet:
            print(shown)
            print(f"More, with pictures: {page}")
        if options.json:
            print(json.dumps({"directory": str(directory), "report": str(page), "table": rows}))


def report_arguments(parser: argparse.ArgumentParser) -> None:
    text = "directory of a run, which may still be running; several are compared"
    parser.add_argument("directories", help=text, metavar="DIR", nargs="+")
    text = "page of a comparison (default: compare.html in the first directory)"
    parser.add_argument("--out", help=text, metavar="FILE")
    _run_arguments(parser)


def report(options: argparse.Namespace) -> None:
    """Write a run's page and pictures, and print its table; or compare runs."""
    directories = list(map(Path, options.directories))
    if len(directories) == 1:
        require(options.out is None, "--out", options.out, "nothing with one run: its page is in its directory")
        _finish(directories[0], options)
        return
    compared = compare(directories)
    page = write_comparison(compared, Path(options.out or directories[0] / "compare.html"))
    if not options.quiet:
        print(comparison_table(compared))
        print(f"More, with a picture and the settings that differ: {page}")
    if options.json:
        means = [(name, [None if row is None else row.mean for row in found]) for name, found in comparison(compared)]
        lines = [{"method": name, "means": found} for name, found in means]
        print(json.dumps({"runs": [str(run.directory) for run in compared], "report": str(page), "table": lines}))


def select_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", help="a result file of SEAL, or one that a run wrote", metavar="RESULT.json")
    parser.add_argument("--out", help="the kept self-edits, a line each, to fine-tune on", required=True)
    _run_arguments(parser)


def select(options: argparse.Namespace) -> None:
    """Keep the best self-edit of each passage, by SEAL's published rule."""
    kept = select_kept(read_result(options.result))
    write_sft(options.out, kept)
    if not options.quiet:
        print(f"{options.out}: {len(kept)} self-edits")
    if options.json:
        print(json.dumps({"out": options.out, "kept": len(kept)}))


def tiny_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="tiny_verb", metavar="VERB", required=True)
    train = verbs.add_parser("train", help="train a miniature from scratch, as the shipped one was")
    train.add_argument(
        "task", nargs="?", default="knowledge", choices=["few-shot", "knowledge"], help="(default: %(default)s)"
    )
    train.add_argument("--out", help="new directory: a Hugging Face checkpoint", required=True, metavar="DIR")
    train.add_argument("--seed", type=int, default=Recipe.seed, metavar="N", help="(default: %(default)s)")
    _run_arguments(train)


def tiny(options: argparse.Namespace) -> None:
    """Train one of the shipped miniatures again."""
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists; accepted: a new or empty directory")
    require(options.seed >= 0, "--seed", options.seed, "an integer >= 0")
    if options.task == "knowledge":
        report = train_tiny(out, Recipe(seed=options.seed), not options.quiet)
    else:
        report = train_puzzle_model(out, PuzzleRecipe(replace(SHAPE, seed=options.seed)), not options.quiet)
    if not options.quiet:
        print(f"{options.out}: " + ", ".join(f"{name} {value:g}" for name, value in report.items()))
    if options.json:
        print(json.dumps({"out": options.out, **report}))
