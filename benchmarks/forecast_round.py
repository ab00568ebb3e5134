"""Recorded forecasts of a published round: python benchmarks/forecast_round.py writes results/forecast_round_*.json.

Each is what `seal-engine plan --round --gpu NAME --json` says, with all that it assumes and counts, and its date.
"""

import json
from typing import Any

import measure
from seal_engine.forecast.forecast import as_json, forecast_round
from seal_engine.forecast.published_round import MODEL, read_passages
from seal_engine.forecast.rates import ASSUMED, COUNTS, GPUS
from seal_engine.model.config import ModelConfig


def forecast(gpu: str) -> dict[str, Any]:
    """A GPU's record, but for when it was made."""
    made = as_json(forecast_round(ModelConfig.from_dict(MODEL), GPUS[gpu], read_passages()))
    return {
        "what": "a forecast by arithmetic; docs/benchmarks.md holds it against a run of ten passages",
        "command": f"seal-engine plan --round --gpu {gpu} --json",
        **made,
        "model": MODEL,
        "assumed": {name: assumption._asdict() for name, assumption in ASSUMED.items()},
        "counts": {phase: {u: c._asdict() for u, c in units.items()} for phase, units in COUNTS.items()},
    }


if __name__ == "__main__":
    machine = measure.machine()
    for name in GPUS:
        record = {"date": machine["date"], "commit": machine["commit"], **forecast(name)}
        file = measure.RESULTS / f"forecast_round_{name}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(file)
