"""The command line. A verb is a function that adds its arguments, and one that runs it; VERBS lists them.

A user's mistake is one line on stderr and exit status 2, and so is a full disk; a run that could not go on is one line
and 1. A reader that leaves (`seal-engine ... | head`) ends the program quietly.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from seal_engine.cli import bench, engine, run, serve
from seal_engine.loop.restem import RunError
from seal_engine.types import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. arguments None: those of the process."""
    parser = _Parser(
        prog="seal-engine",
        description="Self-adapting language models: many LoRA adapters trained and sampled over one frozen base.",
        epilog="Begin with: seal-engine demo",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (add_arguments, execute) in VERBS.items():
        summary = (execute.__doc__ or "").split("\n")[0]
        verb = verbs.add_parser(name, help=summary, description=summary)
        add_arguments(verb)
        verb.set_defaults(execute=execute)
    try:
        options = parser.parse_args(arguments)
        options.execute(options)
        sys.stdout.flush()  # a reader that has left is noticed here, not when the interpreter ends
    except InputError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        goes_on = options.verb in RESUMED
        return _fail("interrupted" + ("; the same command goes on with the run" if goes_on else ""), 130)
    return 0


def _fail(error: object, status: int) -> int:
    print(f"seal-engine: {' '.join(str(error).split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as InputError, in one line, in place of argparse's usage text."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


RESUMED = ("demo", "run", "resume")  # verbs whose work is recorded as it is done
VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "demo": (run.demo_arguments, run.demo),
    "run": (run.run_arguments, run.run),
    "resume": (run.resume_arguments, run.resume),
    "report": (run.report_arguments, run.report),
    "train": (engine.train_arguments, engine.train),
    "generate": (engine.generate_arguments, engine.generate),
    "serve": (serve.serve_arguments, serve.serve),
    "select": (run.select_arguments, run.select),
    "plan": (engine.plan_arguments, engine.plan),
    "bench": (bench.bench_arguments, bench.bench),
    "tiny": (run.tiny_arguments, run.tiny),
}
