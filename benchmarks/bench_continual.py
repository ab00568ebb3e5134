"""One edit after another on the miniature: every method on the same sequences, what it keeps, and what it costs.

The policy of two ReST^EM rounds writes the self-edits: always the policy itself, which no edit touches ("policy"), or
the system that the method has come to ("system", as published). "long" are sequences of 32 passages. "side by side"
times one process with all sequences and methods beside one sequence after another.
"""

from time import perf_counter

import pytest

import measure
from seal_engine import runs
from seal_engine.loop.continual_config import METHODS
from seal_engine.loop.continual_results import PROBES, read_result
from seal_engine.loop.forgetting import mean_matrix
from seal_engine.loop.ledger import Ledger
from seal_engine.tiny.continual_demo import POLICY_ROUNDS

pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="the miniature is for machines without a GPU")
CASES = {
    "policy": {"edit_writer": "policy", "methods": METHODS},
    "system": {"edit_writer": "system", "methods": METHODS},
    "long": {
        "edit_writer": "policy", "sequences": 8, "passages": 32, "probe_writing": 0,
        "methods": ("merge", "null-space", "consolidate", "bank", "oracle"),
    },
}  # fmt: skip
TIMED_METHODS = ("merge", "replay", "null-space", "bank")
TIMED = {"edit_writer": "policy", "passages": 4, "methods": TIMED_METHODS, "probe_writing": 0}
SEQUENCES = 8  # timed side by side


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """The adapters of the policy's rounds, in order."""
    directory = tmp_path_factory.mktemp("policy") / "run"
    runs.start("miniature", POLICY_ROUNDS, directory, lambda line: None, progress=False)
    rounds = range(1, POLICY_ROUNDS["rounds"] + 1)
    return tuple(str(directory / "policies" / f"seed-0-round-{r}") for r in rounds)


def run(directory, policies, settings):
    """A run in a new directory: its result and its seconds."""
    start = perf_counter()
    values = {"policies": policies, **settings}
    runs.start("continual-miniature", values, directory, lambda line: None, progress=False)
    seconds = perf_counter() - start
    with Ledger.read(directory) as ledger:
        return read_result(ledger), seconds


@pytest.mark.parametrize("case", CASES)
def test_continual(benchmark, record, tmp_path, policies, case):
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    result, seconds = run(tmp_path / "run", policies, CASES[case])
    sizes = {"case": case, "sequences": result.sequences, "passages": result.passages}
    untrained = {probe: result.untrained[probe] for probe in PROBES}
    record(**sizes, method="untrained", kept=result.untrained["accuracy"], **untrained)
    for m in result.methods:
        columns = {"learned": m.learned, "kept": m.kept, "transfer": m.transfer, "kl": m.kl, "tokens": m.tokens}
        for name, interval in (("over_merge", m.over_merge), ("over_joint", m.over_joint)):
            columns |= dict(zip((name, f"{name}_low", f"{name}_high"), interval or (), strict=False))
        columns |= {"bytes_kept": m.bytes_kept, "factor": m.factor, "ages": [round(gain or 0.0, 4) for gain in m.ages]}
        columns["matrix"] = [[None if v is None else round(v, 4) for v in row] for row in mean_matrix(m.matrices)]
        record(**sizes, method=m.name, **columns, **m.probes, **m.routing)
    record(**sizes, method="the whole run", seconds=seconds, adapters=result.adapters, **result.seconds)


def test_side_by_side(benchmark, record, tmp_path, policies):
    """All sequences in one process beside one after another, each a run of its own; the model is loaded in each."""
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    together, seconds = run(tmp_path / "together", policies, {**TIMED, "sequences": SEQUENCES})
    alone = 0.0
    for seed in range(SEQUENCES):
        alone += run(tmp_path / f"{seed}", policies, {**TIMED, "sequences": 1, "seeds": (seed,)})[1]
    record(case="side by side", method="the whole run", sequences=SEQUENCES, passages=together.passages,
           seconds=seconds, seconds_one_at_a_time=alone, times_faster=alone / seconds, adapters=together.adapters,
           adapters_at_once=len(TIMED_METHODS) * SEQUENCES)  # fmt: skip
