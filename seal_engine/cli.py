"""The command line. A verb is a function that adds its arguments, and one that runs it; VERBS lists them.

A user's mistake is one line on stderr and exit status 2; a run that could not go on is one line and 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from seal_engine import verbs_bench, verbs_engine, verbs_run
from seal_engine.restem import RunError
from seal_engine.types import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. arguments None: those of the process."""
    parser = _Parser(
        prog="seal-engine",
        description="Self-adapting language models: many LoRA adapters trained and sampled over one frozen base.",
        epilog="Begin with: seal-engine demo",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (describe, run) in VERBS.items():
        summary = (run.__doc__ or "").split("\n")[0]
        verb = verbs.add_parser(name, help=summary, description=summary)
        describe(verb)
        verb.set_defaults(run=run)
    try:
        options = parser.parse_args(arguments)
        options.run(options)
    except InputError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; a run goes on with the same command", 130)
    return 0


def _fail(error: object, status: int) -> int:
    print(f"seal-engine: {' '.join(str(error).split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as InputError, in one line, in place of argparse's usage text."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "demo": (verbs_run.demo_arguments, verbs_run.demo),
    "run": (verbs_run.run_arguments, verbs_run.run),
    "resume": (verbs_run.resume_arguments, verbs_run.resume),
    "report": (verbs_run.report_arguments, verbs_run.report),
    "train": (verbs_engine.train_arguments, verbs_engine.train),
    "generate": (verbs_engine.generate_arguments, verbs_engine.generate),
    "select": (verbs_run.select_arguments, verbs_run.select),
    "plan": (verbs_engine.plan_arguments, verbs_engine.plan),
    "bench": (verbs_bench.bench_arguments, verbs_bench.bench),
    "tiny": (verbs_run.tiny_arguments, verbs_run.tiny),
}
