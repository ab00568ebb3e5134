"""The forecast's table of launches and waits is what the pretended device counts, phase by phase and unit by unit."""

from collections.abc import Callable
from pprint import pformat

import pytest
import torch
from torch import Tensor

import seal_kernels.cross_entropy
from gpu.pretended_cuda import PretendedCuda, recorded_graphs
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.forecast.rates import COUNTS, Count
from seal_engine.model.config import ModelConfig
from seal_engine.model.transformer import Model
from seal_engine.sampling.decode_graph import DecodeGraphs
from seal_engine.training.pass_graph import PassGraphs
from seal_kernels.dispatch import INTERPRET

pytestmark = [
    pytest.mark.skipif(not INTERPRET, reason="kernels run in Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.xdist_group("pretended CUDA"),
]

FIELDS = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
}  # fmt: skip
TARGETS = {1: ("q_proj", "v_proj"), 4: "all-linear"}  # by the number of adapted groups
CHUNK = 4  # tokens whose logits are held at once, here
Phases = dict[str, Count]


@pytest.fixture(scope="module")
def device():
    with PretendedCuda() as device, device.counting_only():
        yield device


class Recorder:
    """Counts a call phase by phase: a phase begins where a function that it names is entered or left."""

    def __init__(self, device: PretendedCuda, monkeypatch: pytest.MonkeyPatch):
        self.device, self.patch, self.marks = device, monkeypatch, []
        self.between(Model, "hidden_states", "forward", "loss")
        self.between(Tensor, "backward", "backward", "optimizer")
        self.between(PassGraphs, "backward", "graphed pass", "optimizer")
        self.between(DecodeGraphs, "hidden_states", "graph's tensors", "sample")

    def between(self, owner: type, name: str, entered: str, left: str) -> None:
        function = getattr(owner, name)

        def marked(*args, **kwargs):
            self.mark(entered)
            out = function(*args, **kwargs)
            self.mark(left)
            return out

        self.patch.setattr(owner, name, marked)

    def mark(self, phase: str) -> None:
        device = self.device
        # To wait for an event of the pass before is no wait: the device has this pass to work on.
        waits = sum(n for line, n in device.syncs.items() if not line.startswith("wait for an event"))
        self.marks.append((phase, (device.launches.total(), device.kernels.total(), waits)))

    def count(self, call: Callable[[], object], first: str) -> Phases:
        self.device.reset_counts()
        self.marks = []
        self.mark(first)
        call()
        self.mark("")
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {phase: Count(*(y - x for x, y in zip(a, b, strict=True))) for (phase, a), (_, b) in pairs}


@pytest.fixture
def recorder(device, monkeypatch):
    monkeypatch.setattr(seal_kernels.cross_entropy, "chunk_tokens", lambda *args: CHUNK)
    return Recorder(device, monkeypatch)


def combine(*terms: tuple[int, Count]) -> Count:
    """The sum of counts, each times a factor."""
    return Count(*(sum(factor * count[i] for factor, count in terms) for i in range(3)))


def engine(layers: int) -> Engine:
    config = ModelConfig.from_dict({**FIELDS, "num_hidden_layers": layers})
    return Engine(Model(config, torch.bfloat16, torch.device("cuda")))


def training_pass(recorder, recompute="none", layers=1, jobs=1, chunks=1, groups=1, graphed=False) -> Phases:
    """A pass that is neither a job's first nor its last; the third of its size, so a graph is replayed."""
    trainer = engine(layers).trainer(recompute="auto" if graphed else recompute)
    ids = list(range(CHUNK * chunks // jobs + 1))
    for seed in range(jobs):
        trainer.submit(TrainJob([ids] * 4, LoraConfig(r=8, target_modules=TARGETS[groups]), seed=seed, num_epochs=1))
    trainer.step()
    trainer.step()
    return recorder.count(trainer.step, "packing")


def sampling_step(recorder, steps_before=3, layers=1, groups=0) -> Phases:
    """The prompts' step with steps_before 0, a replay of a graph with 3; two sequences, each with its adapter."""
    own = engine(layers)
    sampler = own.sampler(num_blocks=8)
    # With one token to sample, no step is launched ahead of the prompts' tokens.
    params = SamplingParams(temperature=0, max_tokens=8 if steps_before else 1, ignore_eos=True)
    for seed in range(2):
        lora = LoraConfig(r=8, target_modules=TARGETS[groups]) if groups else None
        adapter = None if lora is None else own.create_adapter(lora, seed)
        sampler.add_request(None, [1, 2, 3], params, adapter)
    for _ in range(steps_before):
        sampler.step()
    return recorder.count(sampler.step, "batch")


def test_the_table_is_what_is_counted(recorder, device):
    """A unit's count is the difference that one more of it makes; two more make twice that (the next test)."""
    base, passes = training_pass(recorder), lambda **units: training_pass(recorder, **units)
    more = {
        "layer": passes(layers=2), "job": passes(jobs=2), "chunk": passes(chunks=2), "group": passes(groups=4),
    }  # fmt: skip

    def unit(phase: str, name: str) -> Count:
        count = combine((1, more[name][phase]), (-1, base[phase]))
        if name == "group":
            return Count(*(n // 3 for n in count))
        return combine((1, count), (-1, unit(phase, "group"))) if name == "layer" else count

    counted: dict[str, dict[str, Count]] = {}
    for phase, names in (
        ("packing", ()), ("forward", ("layer", "group")), ("loss", ("job", "chunk")),
        ("backward", ("job", "layer", "group")), ("optimizer", ()),
    ):  # fmt: skip
        units = {name: unit(phase, name) for name in names}
        rest = combine((1, base[phase]), *((-1, count) for count in units.values()))
        counted[phase] = {"once": rest, **units}
    names = "layer", "adapted_layer"
    for recompute in ("mlp", "layer"):
        extra = [
            combine((1, passes(recompute=recompute, groups=n)["backward"]), (-1, passes(groups=n)["backward"]))
            for n in TARGETS
        ]
        counted[f"{recompute.replace('mlp', 'MLP')} again"] = dict(zip(names, extra, strict=True))

    replayed = passes(graphed=True)
    assert replayed == passes(graphed=True, layers=2, jobs=2, groups=4), "all else is in the graph"
    counted["graphed pass"] = {"once": replayed["graphed pass"]}

    prompts, with_adapters, all_groups, deeper = (
        sampling_step(recorder, steps_before=0, **units) for units in ({}, {"groups": 1}, {"groups": 4}, {"layers": 2})
    )
    group = Count(*(n // 3 for n in combine((1, all_groups["forward"]), (-1, with_adapters["forward"]))))
    layer = combine((1, deeper["forward"]), (-1, prompts["forward"]))
    counted["paged forward"] = {
        "once": combine((1, prompts["forward"]), (-1, layer)), "layer": layer, "group": group,
    }  # fmt: skip
    counted["batch"] = {
        "once": prompts["batch"], "new_adapters": combine((1, with_adapters["batch"]), (-1, prompts["batch"])),
    }  # fmt: skip
    replay, replay_with_adapters = sampling_step(recorder), sampling_step(recorder, groups=4)
    counted["graph's tensors"] = {
        "once": replay["graph's tensors"],
        "adapters": combine((1, replay_with_adapters["graph's tensors"]), (-1, replay["graph's tensors"])),
    }
    counted["sample"] = {"once": replay["sample"], "prompts": combine((1, prompts["loss"]), (-1, replay["sample"]))}
    assert replay["batch"] == replay_with_adapters["batch"] == Count(), "a graph's tensors are written at once"

    own = engine(1)
    made = {
        n: recorder.count(
            lambda n=n: own.create_adapter(LoraConfig(target_modules=TARGETS[n])).allocate_optimizer_state(), "made"
        )["made"]
        for n in TARGETS
    }
    kind = Count(*(n // 3 for n in combine((1, made[4]), (-1, made[1]))))  # of groups: all layers' at once
    counted["adapter made"] = {"adapter": combine((1, made[1]), (-1, kind)), "kind of group": kind}
    adapter = own.create_adapter(LoraConfig(target_modules=("v_proj",)))
    counted["merge"] = {"projection": recorder.count(lambda: own.merge(adapter), "merge")["merge"]}
    assert counted == COUNTS, f"forecast/rates.py: COUNTS should be\n{pformat(counted)}"


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_units_add_up(recorder, recompute):
    """A pass of 3 layers, 2 jobs, 3 chunks and all groups: each phase is the sum over its units."""
    layers, jobs, chunks, groups = 3, 2, 3, 4
    again = {
        "none": {}, "mlp": {("MLP again", "adapted_layer"): layers},
        "layer": {("layer again", "adapted_layer"): layers},
    }[recompute]  # fmt: skip
    numbers = {"once": 1, "layer": layers, "job": jobs, "chunk": chunks, "group": layers * groups}
    for phase, count in training_pass(recorder, recompute, layers, jobs, chunks, groups).items():
        units = {(phase, name): numbers[name] for name in COUNTS[phase]} | (again if phase == "backward" else {})
        assert count == combine(*((n, COUNTS[phase][name]) for (phase, name), n in units.items())), phase


@pytest.mark.parametrize("groups", [0, 1, 4])
def test_a_graph_holds_what_a_step_of_prompts_launches(recorder, device, monkeypatch, groups):
    """But for the attention of several queries, once a layer. Longer contexts have another kernel for it."""
    graphs = recorded_graphs(monkeypatch)
    sampling_step(recorder, layers=2, groups=groups)
    forward = COUNTS["paged forward"]
    count = combine((1, forward["once"]), (2, forward["layer"]), (2 * groups, forward["group"]))
    assert graphs[0].num_launches == count.torch + count.triton - 2
