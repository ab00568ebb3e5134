"""The demo with a real language model: accuracy, its standard error over passages, and what each method trains."""

from statistics import fmean
from time import process_time
from typing import Any

import pytest

import measure
from gguf_files import smollm2  # pyright: ignore[reportMissingImports]
from seal_engine import runs
from seal_engine.cli.run import DEMOS
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import BASELINE, EVALUATION, Phase
from seal_engine.loop.restem import SELF_EDITS
from seal_engine.real.conclusion import conclusion

SEEDS = (0,)
pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="the demo is for machines without a GPU")


def describe(ledger: Ledger, cpu_seconds: float) -> list[dict[str, Any]]:
    """A row per method: accuracy, its spread, optimizer steps and tokens per adapter; a row of the whole run."""
    trials = {}
    for trial in ledger.trials():
        phase = Phase.parse(trial.phase)
        if phase.stage == BASELINE or phase.method == SELF_EDITS:
            after = f"after round {phase.round}" if phase.round else "before any round"
            name = f"{SELF_EDITS}, {after}" if phase.stage == EVALUATION else phase.method
            trials.setdefault(name, []).append(trial)
    lines: list[dict[str, Any]] = []
    for row in runs.rows(ledger):
        own = trials[row.name]
        lines.append(
            dict(
                method=row.name, accuracy=row.mean, sd=row.deviation, se=row.standard_error, seeds=len(row.accuracies),
                steps=fmean(trial.num_steps for trial in own), tokens=fmean(trial.num_tokens for trial in own),
            )
        )  # fmt: skip
    every = ledger.trials()
    lines.append(
        dict(
            method="the whole run", seconds=sum(step[2] for step in ledger.steps()), cpu_seconds=cpu_seconds,
            conclusion=conclusion(ledger),
            adapters=sum(trial.num_steps > 0 for trial in every), tokens=sum(trial.num_tokens for trial in every),
        )
    )  # fmt: skip
    return lines


def test_demo(benchmark, record, tmp_path):
    directory = tmp_path / "run"
    values = {"seeds": SEEDS, "model": str(smollm2())}
    run = lambda: runs.start(DEMOS["real"], values, directory, lambda line: None, progress=False)  # noqa: E731
    begun = process_time()
    benchmark.pedantic(run, rounds=1, iterations=1)
    cpu_seconds = process_time() - begun
    with Ledger.read(directory) as ledger:
        for row in describe(ledger, cpu_seconds):
            record(task="real", **row)
