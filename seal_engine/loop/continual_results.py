"""What the continual experiment came to, from its ledger alone: measures of every method, for tables and pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seal_engine.files import replace_file
from seal_engine.loop.continual import PARTS, matrices
from seal_engine.loop.continual_probes import UNTRAINED, probe_phase
from seal_engine.loop.forgetting import (
    Matrix,
    backward_transfer,
    deviation_matrix,
    diagonal,
    gain_by_age,
    last_row,
    mean,
    mean_matrix,
    paired_interval,
)
from seal_engine.loop.ledger import Ledger

PROBES = ("reading", "knowledge", "writing")


@dataclass(frozen=True)
class MethodResult:
    """One method over all seeds and sequences. Accuracies are from 0 to 1; None: not measured."""

    name: str
    matrices: list[Matrix]  # of each seed and sequence
    learned: float | None  # the diagonal
    kept: float | None  # the last row
    transfer: float | None  # backward transfer
    ages: list[float | None]  # gain by age of the edit
    over_merge: tuple[float, float, float] | None  # of the last row: mean and 95% interval of pairs
    over_joint: tuple[float, float, float] | None
    probes: dict[str, float | None]  # by PROBES
    kl: float | None
    routing: dict[str, float]
    tokens: int  # trained
    bytes_kept: float | None  # per sequence
    factor: float | None  # mean of the gate's


@dataclass(frozen=True)
class ContinualResult:
    """The whole run, as far as it is done."""

    methods: list[MethodResult]
    untrained: dict[str, float | None]  # "accuracy" on the passages, and PROBES
    sequences: int
    passages: int
    adapters: int  # trained
    seconds: dict[str, float] = field(default_factory=dict)  # by what they were spent on
    cpu_seconds: dict[str, float | None] = field(default_factory=dict)  # the same; None: recorded before they were


def read_result(ledger: Ledger) -> ContinualResult:
    """All that is recorded."""
    config, trials, metrics = ledger.config, ledger.trials(), ledger.metrics()
    contexts = _contexts(ledger)
    by_phase: dict[str, list] = {}
    for trial in trials:
        by_phase.setdefault(trial.phase, []).append(trial)
    found: dict[str, list[Matrix]] = {}
    for name in config["methods"]:
        for seed in config["seeds"]:
            if seed in contexts:
                found.setdefault(name, []).extend(matrices(trials, contexts[seed], seed, name))

    def probed(name: str) -> dict[str, float | None]:
        return {p: mean([t.accuracy for t in by_phase.get(probe_phase(p, name), [])]) for p in PROBES}

    lasts = {name: [last_row(m) for m in own] for name, own in found.items()}
    methods = []
    for name, own in found.items():
        numbers = _metrics_of(metrics, name)
        sizes = numbers.get("bytes", [])
        over = {other: paired_interval(lasts[name], lasts[other]) for other in ("merge", "joint") if other in lasts}
        methods.append(
            MethodResult(
                name=name,
                matrices=own,
                learned=mean([diagonal(m) for m in own]),
                kept=mean(lasts[name]),
                transfer=mean([backward_transfer(m) for m in own]),
                ages=[mean(values) for values in zip(*map(gain_by_age, own), strict=True)],
                over_merge=over.get("merge"),
                over_joint=over.get("joint"),
                probes=probed(name),
                kl=mean(numbers.get("kl", [])),
                routing={k: mean(v) or 0.0 for k, v in numbers.items() if k.startswith("routed")},
                tokens=int(sum(numbers.get("tokens", []))),
                bytes_kept=sizes[-1] / config["sequences"] if sizes else None,
                factor=mean(numbers.get("factor", [])),
            )
        )
    row = mean([mean(m[0]) for m in next(iter(found.values()), [])])
    steps = [entry for entry in metrics if "adapters" in entry]
    every = ledger.steps()
    seconds: dict[str, float] = {name: sum(entry[f"{name}_seconds"] for entry in steps) for name in PARTS if steps}
    seconds["everything"] = sum(taken for _, _, taken, _ in every)
    cpu_seconds: dict[str, float | None] = {
        name: _sum([entry.get(f"{name}_cpu_seconds") for entry in steps]) for name in PARTS if steps
    }
    cpu_seconds["everything"] = _sum([taken for *_, taken in every])
    trained = sum(entry["adapters"] for entry in steps)
    untrained = {"accuracy": row, **probed(UNTRAINED)}
    return ContinualResult(methods, untrained, config["sequences"], config["passages"], trained, seconds, cpu_seconds)


def _sum(values: Sequence[float | None]) -> float | None:
    """None where a value is missing."""
    return None if None in values else sum(value for value in values if value is not None)


def _contexts(ledger: Ledger) -> dict[int, list[list[str]]]:
    """Seed -> its sequences, from what was written in each step."""
    config = ledger.config
    found: dict[int, list[list[str]]] = {}
    for edit in ledger.self_edits():
        step, _, method = edit.phase.partition(", ")
        if step.startswith("step ") and method == config["methods"][0]:
            own = found.setdefault(edit.seed, [[""] * config["passages"] for _ in range(config["sequences"])])
            own[edit.index][int(step.removeprefix("step ")) - 1] = edit.context
    return found


def _metrics_of(metrics: Sequence[dict[str, Any]], method: str) -> dict[str, list[Any]]:
    """Name -> values in the order of steps, of the metrics "METHOD: NAME"."""
    found: dict[str, list[Any]] = {}
    for entry in metrics:
        for key, value in entry.items():
            if key.startswith(f"{method}: ") and value is not None and math.isfinite(value):
                found.setdefault(key.removeprefix(f"{method}: "), []).append(value)
    return found


def table(result: ContinualResult) -> str:
    """The measures as text: accuracies in percent."""
    heads = ["method", "learned", "kept", "transfer", "over merge (95%)", "reading", "knew", "writing", "KL", "tokens"]
    merge = next((m.tokens for m in result.methods if m.name == "merge"), 0)
    lines = [heads]
    base = result.untrained
    rest = [_percent(base[p]) for p in PROBES]
    lines.append([UNTRAINED, "", _percent(base["accuracy"]), "", "", *rest, "0", ""])
    for m in result.methods:
        cost = f"{m.tokens / merge:.2f}x" if merge else f"{m.tokens:,}"
        probes = [_percent(m.probes[p]) for p in PROBES]
        kl = "" if m.kl is None else f"{m.kl:.3f}"
        scores = _percent(m.learned), _percent(m.kept), _percent(m.transfer), interval(m.over_merge)
        lines.append([m.name, *scores, *probes, kl, cost])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    rows = []
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        rows.append("  ".join([name.ljust(widths[0]), *aligned]))
    for m in result.methods:
        rows += [f"{m.name}: {kind}: {_percent(share)}" for kind, share in m.routing.items()]
    return "\n".join(row.rstrip() for row in rows)


def interval(pair: tuple[float, float, float] | None) -> str:
    """A mean difference and its interval, in points."""
    return "" if pair is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in pair))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def write_summaries(ledger: Ledger) -> list[Path]:
    """SEAL's summary file of each seed and method: seed-S-METHOD-summary.json in the run's directory."""
    config, files, trials = ledger.config, [], ledger.trials()
    for seed, sequences in _contexts(ledger).items():
        for name in config["methods"]:
            found = matrices(trials, sequences, seed, name)
            summary = {
                "mean_over_sequences": mean_matrix(found),
                "std_over_sequences": deviation_matrix(found),
                "n_sequences": len(sequences),
                "n_datapoints": len(sequences[0]),
                "dataset": config.get("data", ""),
                "base_model": Path(str(config.get("model", ""))).name,
            }
            content = json.dumps(summary, indent=2).encode()
            files.append(replace_file(ledger.directory / f"seed-{seed}-{name}-summary.json", content))
    return files
