"""The command line. A verb is a function that adds its arguments, and one that runs it; VERBS names their module.

The module of a verb, and torch with it, is imported when the verb is called: --help and mistakes are answered at once.

A user's mistake is one line on stderr and exit status 2, and so is a full disk; a run that could not go on is one line
and 1. A reader that leaves (`seal-engine ... | head`) ends the program quietly.
"""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from seal_engine import __version__
from seal_engine.cli.parser import Parser
from seal_engine.errors import InputError, RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. arguments None: those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        options = _parser(verb).parse_args(arguments)
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
        goes_on = verb in RESUMED
        return _fail("interrupted" + ("; the same command goes on with the run" if goes_on else ""), 130)
    return 0


def _fail(error: object, status: int) -> int:
    print(f"seal-engine: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _parser(called: str | None) -> Parser:
    """The parser of the command line, with the arguments of the verb that is called."""
    parser = Parser(
        prog="seal-engine",
        description="Self-adapting language models: many LoRA adapters trained and sampled over one frozen base.",
        epilog="Begin with: seal-engine demo",
    )
    parser.add_argument("--version", action="version", version=f"seal-engine {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module_name, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        if name == called:
            module = import_module(f"seal_engine.cli.{module_name}")
            getattr(module, f"{name}_arguments")(verb)
            verb.set_defaults(execute=getattr(module, name))
    return parser


RESUMED = ("demo", "run", "resume")  # verbs whose work is recorded as it is done
VERBS = {  # name -> the module of seal_engine.cli that has the functions NAME and NAME_arguments, and a summary
    "demo": (
        "run",
        "Watch a small model learn to write its own training data: minutes on a CPU, no download.",
    ),
    "run": ("run", "Run the loop on a task: self-edits, adapters, questions, a better policy."),
    "resume": ("run", "Resume a run that was interrupted, or add rounds to one that is finished."),
    "report": ("run", "Write a run's page and pictures, and print its table; or compare runs."),
    "train": ("engine", "Train an adapter on each file, all at once."),
    "generate": ("engine", "Continue prompts with the base or with adapters, all at once."),
    "serve": (
        "serve",
        "Serve a model and its adapters: OpenAI's API, vLLM's adapter calls, Tinker's API, SEAL's inner loop.",
    ),
    "select": ("run", "Keep the best self-edit of each passage, by SEAL's published rule."),
    "plan": (
        "plan",
        "Say how many adapters fit in memory at once, and how long a training step or a whole round takes.",
    ),
    "bench": (
        "bench",
        "Measure this checkout on this machine: its tests first, then speed, beside what else there is.",
    ),
    "tiny": ("run", "Train one of the shipped miniatures again."),
}
