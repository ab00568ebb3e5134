"""The forecast of a round: its clocks and costs by hand, its packing beside the engine's own, its record."""

import json
import random
import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_seal_round
import seal_engine.forecast.simulation
import seal_engine.plan
import seal_engine.training.trainer
import seal_round
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.cli.main import main
from seal_engine.forecast.forecast import forecast_round
from seal_engine.forecast.published_round import INNER, MODEL, Base, Passage, floors, read_passages
from seal_engine.forecast.rates import ASSUMED, COUNTS, GPUS, Assumption, Count, Gpu
from seal_engine.forecast.simulation import LowRank, Sample, Simulation
from seal_engine.forecast.timeline import Timeline
from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig
from seal_engine.model.transformer import Model
from seal_engine.training.trainer import Trainer

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
TINY = ModelConfig.from_dict({
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "dtype": "bfloat16",
})  # fmt: skip
PASSAGE = Passage(prompt=3, passage=2, completions=[4], sequences=[[2, 5]], questions=[3], kept=0)
QWEN = ModelConfig.from_dict(MODEL)


@pytest.fixture
def nothing_assumed(monkeypatch):
    """The host and launches cost nothing, rates are reached, and no pass is padded for a graph."""
    monkeypatch.setattr(seal_engine.plan, "GRAPHED_FLOPS", 0.0)
    for name in ASSUMED:
        monkeypatch.setitem(ASSUMED, name, Assumption(1e30 if "bytes/s" in name else 0.0, ""))
    monkeypatch.setitem(ASSUMED, "device: share of its rates", Assumption(1.0, ""))


def seconds(matrix_rate: float, copy_rate: float) -> dict[tuple[str, str], float]:
    rows = forecast_round(TINY, Gpu(1 << 40, matrix_rate, copy_rate, ""), [PASSAGE]).rows
    return {(row.part, row.what): row.seconds for row in rows}


def test_clocks(nothing_assumed, monkeypatch):
    """A launch of torch takes 1 s, of Triton 2 s, a wait 3 s.

    The first phase launches for 4 s, and its work takes 10 s: the clocks show 4 and 10. The second does not wait: it
    launches until 5, and its 1 s of work ends at 11. The third waits, until 11 + 3, and launches until 15; its half
    second of work begins at 14 and is done, too, when its launch is. The device did nothing in that wait and launch.
    """
    for name, value in (("launch of torch", 1.0), ("launch of Triton", 2.0), ("wait", 3.0)):
        monkeypatch.setitem(ASSUMED, f"host: {name}", Assumption(value, ""))
    clock = Timeline(GPUS["h100"])
    clock.begin("all")
    clock.phase(Count(2, 1, 0), ("a", 10.0))
    assert (clock.host, clock.device) == (4.0, 10.0)
    clock.phase(Count(1, 0, 0), ("a", 1.0))
    assert (clock.host, clock.device) == (5.0, 11.0)
    clock.phase(Count(1, 0, 1), ("b", 0.5))
    assert (clock.host, clock.device) == (15.0, 15.0)
    clock.begin("next")
    assert clock.elapsed["all"] == 15.0
    assert (clock.busy["all"]["a"], clock.busy["all"]["b"]) == (11.0, 0.5)
    assert {name: value for name, value in clock.exposed["all"].items() if value} == {
        "host: waits": 3.0, "host: launches": 1.0
    }  # fmt: skip


def test_flops_by_hand(nothing_assumed):
    """At 1 FLOP/s seconds are FLOPs. The layer has 16 (2 x 16 + 2 x 16 + 3 x 32) = 2560 parameters, the head 64 x 16.

    Sampling: 3 tokens of the prompt (2 x 2560 each), 6 pairs of attention (4 x 16 each), and the head once; then three
    steps of one token. Training, 3 adapters, 10 epochs: 210 tokens, of which 150 are targets; 4 FLOPs a parameter. q
    and v of rank 32 are 32 x 16 x 4 = 2048 numbers: 6 FLOPs each. Pairs: (3 + 15) x 30, 18 x 16 FLOPs each.
    """
    rows = seconds(matrix_rate=1.0, copy_rate=1e30)
    assert rows["sampling", "prefill"] == pytest.approx(3 * 2 * 2560 + 6 * 4 * 16 + 2 * 1024)
    assert rows["sampling", "decode"] == pytest.approx(3 * (2 * 2560 + 2 * 1024))
    assert rows["training", "base products"] == pytest.approx(4 * 2560 * 210 + 4 * 1024 * 150)
    assert rows["training", "low-rank products"] == pytest.approx(6 * 2048 * 210)
    assert rows["training", "attention"] == pytest.approx(18 * 30 * 18 * 16)
    assert rows["training", "launches and host"] == pytest.approx(0, abs=1e-6)


def test_graphed_passes(nothing_assumed, monkeypatch):
    """20 passes of 6 or 15 tokens, padded to 16. A replay and its tensors are launched, not each kernel."""
    monkeypatch.setattr(seal_engine.plan, "GRAPHED_FLOPS", 1e12)
    rows = seconds(matrix_rate=1.0, copy_rate=1e30)
    assert rows["training", "base products"] == pytest.approx(4 * 2560 * 16 * 20 + 4 * 1024 * 150)
    monkeypatch.setitem(ASSUMED, "host: launch of torch", Assumption(1.0, ""))
    launched = {}
    for flops in (0.0, 1e12):
        monkeypatch.setattr(seal_engine.plan, "GRAPHED_FLOPS", flops)
        launched[flops] = seconds(matrix_rate=1e30, copy_rate=1e30)["training", "launches and host"]
    once = sum(COUNTS[phase]["once"].torch for phase in ("packing", "forward", "loss", "backward"))
    layer = COUNTS["forward"]["layer"].torch + COUNTS["backward"]["layer"].torch
    saved = 20 * (once + layer + COUNTS["loss"]["chunk"].torch - COUNTS["graphed pass"]["once"].torch)
    assert launched[0.0] - launched[1e12] == pytest.approx(saved)


def test_bytes_by_hand(nothing_assumed):
    """At 1 byte/s seconds are bytes. 20 passes of 3 adapters: 36 a parameter for the optimizer, 16 for the products.

    Low-rank products also read and write activations: 2 bytes of 16 inputs and twice 32 outputs forward, of three times
    16 and twice 32 backward, a token. Decoding: three steps read layer and head (2 bytes each), the K/V of 4, 5 and 6
    tokens (64 bytes each), and make three rows of 64 logits (2 + 2 + 4 bytes, and 3.5 passes of 4); activations of a
    token are 2 x (2 x 32) for attention and 2 x (8 x 16 + 2 x 32 + 3 x 32) for the rest.
    """
    rows = seconds(matrix_rate=1e30, copy_rate=1.0)
    assert rows["training", "optimizer"] == pytest.approx(36 * 2048 * 60)
    activations = 2 * ((16 + 64) + (48 + 64)) * 210
    assert rows["training", "low-rank products"] == pytest.approx(16 * 2048 * 60 + activations)
    step = 2 * (2560 + 1024) + 64 * (2 + 2 + 4 + 14) + 2 * 64 + 2 * (128 + 64 + 96)
    assert rows["sampling", "decode"] == pytest.approx(3 * step + 64 * (4 + 5 + 6))


def test_waits_and_launches_only_add():
    """With costs of the host, no part is faster than at its rates, and none faster than its floor."""
    made = forecast_round(QWEN, GPUS["h100"], read_passages())
    for row in made.rows:
        assert row.seconds >= row.floor_seconds, row
    whole, parts = made.rows[-1], [row for row in made.rows[:-1] if not row.what]
    assert [row.part for row in parts] == ["sampling", "training", "asking", "updating"]
    for part in parts:
        inside = [row.seconds for row in made.rows if row.part == part.part and row.what]
        assert part.seconds == pytest.approx(sum(inside))
    assert whole.seconds == pytest.approx(sum(row.seconds for row in parts))


def test_floors_are_the_benchmarks():
    """A part's rows have the FLOPs and bytes that benchmarks/bench_seal_round.py counts for the part."""
    model = SimpleNamespace(dtype=torch.bfloat16, compute_dtype=torch.bfloat16, product_dtype=torch.bfloat16)
    work = bench_seal_round.draw(seal_round.read_trace(), QWEN)
    expected = bench_seal_round.costs(SimpleNamespace(config=QWEN, model=model), work)  # pyright: ignore
    ours = floors(Base(QWEN, 2), read_passages())
    for part, costs in expected.items():
        rows = [cost for (name, _), cost in ours.items() if name == part]
        assert tuple(map(sum, zip(*rows, strict=True))) == pytest.approx(costs), part


def tiny_model() -> Model:
    model = Model(TINY, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _, tensor in model.named_tensors():
        tensor.normal_(0, 0.02, generator=generator)
    return model


@pytest.mark.parametrize("room", [2, 5, 100], ids=["two adapters fit", "five", "all"])
def test_passes_are_the_trainers(monkeypatch, room):
    """Twelve jobs of 3 to 9 steps, 60 tokens a pass: the simulated passes hold what the Trainer's do, in its order."""
    draw = random.Random(0)
    jobs = [[draw.randint(5, 25) for _ in range(draw.randint(3, 9))] for _ in range(12)]
    monkeypatch.setattr(seal_engine.forecast.simulation, "TOKEN_BUDGET", 60)
    simulation = Simulation(TINY, GPUS["h100"])
    size = 4 * LowRank.of(TINY, INNER).parameters
    simulation.state_bytes = 4 * size * room
    simulation.timeline.begin("training")
    simulation.train(jobs)

    passes, moves = [], []
    target_logprobs = seal_engine.training.trainer.target_logprobs

    def recorded(model, batches, recompute):
        passes.append([len(sequence) for batch in batches for sequence in batch.sequences])
        return target_logprobs(model, batches, recompute)

    monkeypatch.setattr(seal_engine.training.trainer, "target_logprobs", recorded)
    monkeypatch.setattr(Adapter, "offload", lambda self: moves.append(self) or self.nbytes)  # as on a GPU
    engine = Engine(tiny_model())
    trainer = Trainer(engine.model, engine.inputs.train_sequences, 60, 4 * size * room)
    for lengths in sorted(jobs, key=len, reverse=True):
        trainer.submit(TrainJob([[1] * n for n in lengths], INNER, num_epochs=1, seed=None))
    while trainer.busy:
        trainer.step()
    assert simulation.passes == passes
    assert simulation.num_offloaded == len(moves)
    assert (len(moves) > 0) == (room < 100)


def test_steps_are_the_samplers(monkeypatch):
    """Twenty prompts, eight at once: as many tokens and sequences in each step as the Sampler computes."""
    draw = random.Random(0)
    lengths = [(draw.randint(2, 9), draw.randint(1, 6)) for _ in range(20)]
    monkeypatch.setattr(seal_engine.forecast.simulation, "MAX_NUM_SEQS", 8)
    simulation = Simulation(TINY, GPUS["h100"])
    simulation.generate("asking", [Sample(prompt, prompt, left) for prompt, left in lengths], LowRank(), 2.5)

    sampler = Engine(tiny_model()).sampler(num_blocks=100, max_num_seqs=8)
    for i, (prompt, left) in enumerate(lengths):
        params = SamplingParams(temperature=0, max_tokens=left, ignore_eos=True)
        sampler.add_request(None, [i + 1] * prompt, params)
    computed, sampled = [0], []
    while sampler.busy:
        sampled.append(len(sampler.step()))
        computed.append(sampler.tokens_computed)
    assert simulation.steps == [(b - a, n) for (a, b), n in zip(pairwise(computed), sampled, strict=True)]


def test_an_adapters_sizes():
    """All seven projections of one layer: four groups with inputs 16, 16, 16 and 32; q, k, v, o, gate, up, down."""
    assert LowRank.of(TINY, LoraConfig(r=1, target_modules="all-linear")) == LowRank(
        parameters=7 * 16 + 32 - 16 + 5 * 16 + 2 * 32, projections=7, groups=4, inputs=80, outputs=5 * 16 + 2 * 32
    )


@pytest.mark.parametrize("gpu", GPUS)
def test_the_record(gpu):
    """It has today's form and, where its counts and assumptions are still today's, today's numbers.

    `python benchmarks/forecast_round.py` makes it anew, and `python benchmarks/readme.py` the page that shows it.
    """
    record = json.loads((RESULTS / f"forecast_round_{gpu}.json").read_text())
    today = json.loads(json.dumps(runpy.run_path(str(RESULTS.parent / "forecast_round.py"))["forecast"](gpu)))
    assert {"date", "commit", *today} == set(record)
    assert [list(row) for row in record["rows"]] == [list(row) for row in today["rows"]]
    assert [(row["part"], row["what"]) for row in record["rows"]] == [(r["part"], r["what"]) for r in today["rows"]]
    if all(record[name] == today[name] for name in ("counts", "assumed", "gpu")):
        for row, now in zip(record["rows"], today["rows"], strict=True):
            assert (row["seconds"], row["floor_seconds"]) == pytest.approx((now["seconds"], now["floor_seconds"]))


def test_what_a_cpu_can_measure_is_what_was_measured():
    """Rounded to two figures: benchmarks/bench_forecast.py measures it, in ms and us."""
    rows = json.loads((RESULTS / "bench_forecast_cpu.json").read_text())["rows"]
    (_, pass_ms, adapter_us), (_, step_ms, sequence_us) = (list(row.values()) for row in rows)
    measured = {
        "training pass": pass_ms / 1e3, "adapter of a training pass": adapter_us / 1e6,
        "sampling step": step_ms / 1e3, "sequence of a sampling step": sequence_us / 1e6,
    }  # fmt: skip
    for name, value in measured.items():
        assert ASSUMED[f"host: {name}"].value == pytest.approx(value, rel=0.05), name


def test_the_command(capsys, tmp_path):
    """The table ends with the round; the JSON object is the forecast; a config of another model gives another one."""
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 14}))
    totals = []
    for model in ([], ["--model", str(tmp_path)], ["--bandwidth", "1e12"]):
        assert main(["plan", "--round", "--gpu", "h200", *model, "--json"]) == 0
        *table, last = capsys.readouterr().out.splitlines()
        row = json.loads(last)["rows"][-1]
        assert any(line.startswith("round") and f"{row['seconds']:.2f}" in line for line in table)
        assert table[-1].startswith("A run of ten passages")
        totals.append(row["seconds"])
    assert totals[1] < totals[0] < totals[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "required: --gpu", id="no GPU"),
        pytest.param(["--gpu", "h100", "--rank", "4"], "--rank: found 4; accepted: none with --round", id="own rank"),
        pytest.param(["--gpu", "h100", "--cpu"], "--cpu: found True", id="CPU"),
        pytest.param(["--gpu", "a100"], "invalid choice: 'a100'", id="unknown GPU"),
        pytest.param(["--gpu", "h100", "--memory", "1GiB"], "memory_bytes: found 1073741824", id="too little memory"),
        pytest.param(["--gpu", "h100", "--matrix-rate", "-1"], "matrix_rate: found -1.0", id="rate below 0"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["plan", "--round", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


def test_counts_have_no_unit_that_nothing_uses():
    """Each phase of the table is launched by the simulation: a phase that the engine lost would stay unnoticed."""
    source = Path(seal_engine.forecast.simulation.__file__).read_text()
    assert [phase for phase in COUNTS if f'launches("{phase}"' not in source] == []
