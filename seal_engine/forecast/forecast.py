"""The forecast of a round as rows: seconds, the floor beside them, and what bounds them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from seal_engine.engine import TOKEN_BUDGET
from seal_engine.forecast.published_round import INNER, REPEATS, Passage, floors
from seal_engine.forecast.rates import Gpu
from seal_engine.forecast.simulation import Simulation
from seal_engine.forecast.timeline import STARTS
from seal_engine.model.config import ModelConfig
from seal_engine.plan import make_plan


@dataclass(frozen=True)
class Row:
    """A row of a part. Parts and the round have rows, too, without `what`; theirs are the floors to compare a run with.

    A part's floor may be lower than the sum of its rows': bytes of one row may move while another computes.
    """

    part: str
    what: str
    seconds: float
    floor_seconds: float
    limit: str  # what takes most of the seconds, on the device or, where that has nothing to do, on the host


@dataclass(frozen=True)
class Forecast:
    """A round on one GPU."""

    gpu: Gpu
    rows: list[Row]
    recompute: str  # what the Trainer computes again
    adapters_planned: int  # resident at once, as make_plan says with the same recomputation
    adapters_resident: int  # at most, in the simulation
    adapters_offloaded: int  # moves to host memory
    training_passes: int
    sampling_steps: int
    kv_blocks: int  # of 16 tokens: half of what is free beside the weights


def forecast_round(config: ModelConfig, gpu: Gpu, passages: Sequence[Passage]) -> Forecast:
    """Simulate a round. Raises InputError where not even one adapter fits."""
    lengths = [n for p in passages for edit in p.sequences for n in edit]
    simulation = Simulation(config, gpu)
    plan = make_plan(
        config, INNER, gpu.memory, max(1, sum(lengths) // len(lengths)),
        adapters=REPEATS * sum(len(p.sequences) for p in passages), tokens=TOKEN_BUDGET,
        dtype=config.dtype or torch.bfloat16, recompute=simulation.recompute,
        matrix_rate=gpu.matrix_rate, bandwidth=gpu.copy_rate,
    )  # fmt: skip
    simulation.run(passages)
    return Forecast(
        gpu=gpu,
        rows=_rows(simulation, passages),
        recompute=simulation.recompute,
        adapters_planned=plan.adapters,
        adapters_resident=simulation.max_resident,
        adapters_offloaded=simulation.num_offloaded,
        training_passes=len(simulation.passes),
        sampling_steps=len(simulation.steps),
        kv_blocks=simulation.free_bytes // 2 // (16 * simulation.base.kv),
    )


def _rows(simulation: Simulation, passages: Sequence[Passage]) -> list[Row]:
    """Each part's row, then those in it in the order in which they begin; the round's is the last."""
    clock, fewest, gpu = simulation.timeline, floors(simulation.base, passages), simulation.gpu

    def floor(part: str, what: str = "") -> float:
        costs = [cost for key, cost in fewest.items() if key[0] == part and what in ("", key[1])]
        flops, moved = sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)
        return max(flops / gpu.matrix_rate, moved / gpu.copy_rate)

    def row(part: str, what: str, seconds: float, spent: Mapping[str, float]) -> Row:
        return Row(part, what, seconds, floor(part, what), max(spent, key=lambda bound: spent[bound]))

    rows: list[Row] = []
    for part in ("sampling", "training", "asking", "updating"):
        own: list[Row] = []
        for section, seconds in clock.elapsed.items():
            name, _, what = section.partition(", ")
            busy, exposed = clock.busy.get(section, {}), clock.exposed.get(section, {})
            if name == part and what:
                own.append(row(part, what, seconds, {**busy, **exposed}))
            elif name == part:
                work = {bound: spent for bound, spent in busy.items() if bound != STARTS}
                for kind in dict.fromkeys(bound.split(":")[0] for bound in work):
                    of_kind = {b.split(": ")[1]: spent for b, spent in work.items() if b.startswith(f"{kind}:")}
                    own.append(row(part, kind, sum(of_kind.values()), of_kind))
                rest = {STARTS: busy[STARTS], **exposed}
                own.append(row(part, "launches and host", seconds - sum(work.values()), rest))
        longest = max(own, key=lambda r: r.seconds)
        rows += [Row(part, "", sum(r.seconds for r in own), floor(part), f"{longest.what}, {longest.limit}"), *own]
    parts = [r for r in rows if not r.what]
    longest = max(parts, key=lambda r: r.seconds)
    return [*rows, Row("round", "", sum(r.seconds for r in parts), sum(r.floor_seconds for r in parts), longest.part)]


def as_json(forecast: Forecast) -> dict:
    """A forecast as JSON holds it."""
    return {**asdict(forecast), "gpu": forecast.gpu._asdict()}
