"""The command line. A verb is a function that adds its arguments, and one that runs it; VERBS lists them.

A user's mistake is one line on stderr and exit status 2.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seal_engine.config import DTYPES, ModelConfig
from seal_engine.files import read_json
from seal_engine.plan import RECOMPUTE, Plan, make_plan
from seal_engine.types import InputError, LoraConfig

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. arguments None: those of the process."""
    parser = _Parser(prog="seal-engine", description="Train and sample many LoRA adapters over one frozen base.")
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
        print(f"seal-engine: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as InputError, in one line, in place of argparse's usage text."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **kwargs: Any) -> None:
        shown = "" if kwargs.get("default") is None else " (default: %(default)s)"
        parser.add_argument(name, help=text + shown, **kwargs)

    add("--model", "checkpoint directory, or a config.json: weights are not read", required=True, metavar="PATH")
    add("--memory", "of the device: 139GiB, 80GB, or bytes", required=True, type=memory, metavar="SIZE")
    add("--rank", "r of each adapter", type=int, default=8, metavar="N")
    add("--alpha", "lora_alpha (default: the rank)", type=float, metavar="X")
    add(
        "--targets", "adapted projections, separated by commas, or all-linear", default="q_proj,v_proj", metavar="NAMES"
    )
    add("--sequence-tokens", "tokens an adapter trains on in one step", required=True, type=int, metavar="N")
    add("--adapters", "adapters to train (default: as many as fit)", type=int, metavar="N")
    add("--tokens", "tokens in one step, of all adapters together", type=int, default=8192, metavar="N")
    add("--dtype", "of the base weights (default: as the config says)", choices=sorted(DTYPES))
    add("--cpu", "plan for a CPU: activations are float32, and rates are a CPU's", action="store_true")
    rate = "FLOP/s of matrix products, as measured (default: 750e12, or 150e9 with --cpu)"
    add("--matrix-rate", rate, type=float, metavar="X")
    bandwidth = "bytes/s of memory, as measured (default: 4e12, or 20e9 with --cpu)"
    add("--bandwidth", bandwidth, type=float, metavar="X")
    add("--recompute", "what backward computes again", choices=("auto", *RECOMPUTE), default="auto")
    add("--json", "add one JSON object as the last line of stdout", action="store_true")


def plan(options: argparse.Namespace) -> None:
    """Say how many adapters fit in memory at once, and how long a training step takes."""
    path = Path(options.model)
    if path.suffix == ".json":
        config = ModelConfig.from_dict(read_json(path), str(path))
    else:
        config = ModelConfig.from_directory(path)
    targets = options.targets if options.targets == "all-linear" else tuple(options.targets.split(","))
    alpha = options.rank if options.alpha is None else options.alpha
    made = make_plan(
        config,
        LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=targets),
        options.memory,
        options.sequence_tokens,
        adapters=options.adapters,
        tokens=options.tokens,
        dtype=DTYPES.get(options.dtype),
        cpu=options.cpu,
        recompute=options.recompute,
        matrix_rate=options.matrix_rate,
        bandwidth=options.bandwidth,
    )
    print(_plan_table(made, options.memory))
    if options.json:
        speed = {"step_seconds": made.step_seconds, "tokens_per_second": made.tokens / made.step_seconds}
        print(json.dumps({"memory_bytes": options.memory, **asdict(made), **speed}))


def _plan_table(made: Plan, memory_bytes: int) -> str:
    sizes = {
        "base weights": made.weights_bytes,
        "adapters": made.master_bytes,
        "their gradients": made.gradient_bytes,
        "their moments": made.moment_bytes,
        "activations": made.activation_bytes,
        "left for sampling": made.kv_bytes,
    }
    sizes["kept free"] = memory_bytes - sum(sizes.values())
    times = {
        "base products": made.matrix_seconds,
        "base weights read (meanwhile)": made.weight_bytes_seconds,
        "low-rank products": made.adapter_matrix_seconds,
        "adapters and moments read and written (meanwhile)": made.adapter_bytes_seconds,
        "whole step": made.step_seconds,
    }
    rows = [("Memory", "GiB"), *((name, f"{size / 2**30:.2f}") for name, size in sizes.items()), ("", "")]
    rows += [("Time", "ms"), *((name, f"{1000 * seconds:.3f}") for name, seconds in times.items()), ("", "")]
    rows += [
        ("adapters resident", f"{made.adapters}"),
        ("tokens a step", f"{made.tokens}"),
        ("tokens a second", f"{made.tokens / made.step_seconds:,.0f}"),
        ("recomputed in backward", made.recompute),
        ("limited by", made.limit),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value:>12}".rstrip() for name, value in rows)


def memory(text: str) -> int:
    """Bytes from "139GiB" (binary), "80GB" (decimal), "512M" (binary) or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a size such as 139GiB, 80GB or 1000000000")
    return int(float(match[1]) * units[match[2].lower()])


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "plan": (_plan_arguments, plan),
}
