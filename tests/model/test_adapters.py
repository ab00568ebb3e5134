"""Adapters on disk and in memory: PEFT reads what is written here and the other way round, merging, and refusals."""

import json
import math
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file

import oracle
from compare import relative_error
from seal_engine import Adapter, Engine, InputError, LoraConfig, SamplingParams, TrainJob
from seal_engine.model.adapter_layout import ALIGNMENT

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ["llama-biases-tied", "mistral-window", "qwen2", "qwen3"]
SEQUENCES = oracle.sequences([9, 1, 24], seed=3)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NO_SUCH = "absent.lora_A.weight"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

# Every field that changes the forward pass.
CONFIGS = {
    "defaults": LoraConfig(),
    "seven": LoraConfig(r=5, lora_alpha=11, target_modules=SEVEN),
    "all-linear": LoraConfig(r=3, lora_alpha=4, target_modules="all-linear"),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, target_modules=SEVEN,
        # Of several keys that match, the first counts.
        rank_pattern={r"layers\.1\..*": 9, "q_proj": 2, "mlp.up_proj": 1},
        alpha_pattern={"q_proj": 3.5, r".*\.0\.mlp\..*": 1},
    ),
    "rslora": LoraConfig(r=6, lora_alpha=5, target_modules=["o_proj", "down_proj"], use_rslora=True),
    "rslora with patterns": LoraConfig(
        r=6, target_modules="all-linear", use_rslora=True, rank_pattern={"k_proj": 16}, alpha_pattern={"k_proj": 2}
    ),
    "regex": LoraConfig(r=2, target_modules=r".*layers\.(0|2)\.(self_attn\.[qo]_proj|mlp\.gate_proj)"),
    "single layers": LoraConfig(r=7, target_modules=("layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj")),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_pretrained(checkpoint("llama"), device="cpu")


def random_adapter(engine, config, seed=0):
    """B random too, so that it changes the logits."""
    adapter = engine.create_adapter(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, _, b in adapter.projections():
        b.normal_(0, 0.1, generator=generator)
    return adapter


def same_logits(ours, theirs, base):
    for a, b, without in zip(ours, theirs, base, strict=True):
        assert relative_error(a, b) < 1e-5
        assert relative_error(without, b) > 1e-3, "the adapter changes the logits"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_reads_what_is_written(name, checkpoint, tmp_path):
    engine = Engine.from_pretrained(checkpoint(name), device="cpu")
    base = oracle.logits(oracle.load(checkpoint(name), torch.float32), SEQUENCES)
    for i, (label, config) in enumerate(CONFIGS.items()):
        adapter = random_adapter(engine, config, seed=i)
        adapter.save(tmp_path / label)
        peft = PeftModel.from_pretrained(oracle.load(checkpoint(name), torch.float32), tmp_path / label).eval()
        same_logits(engine.logits(SEQUENCES, adapters=adapter), oracle.logits(peft, SEQUENCES), base)
        again = engine.load_adapter(tmp_path / label)
        assert torch.equal(again.params, adapter.params)
        assert (again.layout.scales == adapter.layout.scales).all()
        again.save(tmp_path / f"{label} again")
        for file in (CONFIG, WEIGHTS):
            assert (tmp_path / label / file).read_bytes() == (tmp_path / f"{label} again" / file).read_bytes()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_peft_writes_is_read(name, checkpoint, tmp_path):
    engine = Engine.from_pretrained(checkpoint(name), device="cpu")
    base = oracle.logits(oracle.load(checkpoint(name), torch.float32), SEQUENCES)
    for label, config in CONFIGS.items():
        fields = {field: getattr(config, field) for field in config.__dataclass_fields__}
        if not isinstance(config.target_modules, str):
            fields["target_modules"] = list(config.target_modules)
        torch.manual_seed(7)
        theirs = PeftConfig(task_type="CAUSAL_LM", **fields)
        peft = get_peft_model(oracle.load(checkpoint(name), torch.float32), theirs).eval()
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0, 0.1)
        peft.save_pretrained(tmp_path / label)
        adapter = engine.load_adapter(tmp_path / label)
        same_logits(engine.logits(SEQUENCES, adapters=adapter), oracle.logits(peft, SEQUENCES), base)
        named = {n.replace(".default", ""): p for n, p in peft.named_parameters()}
        for module, a, b in adapter.projections():
            assert torch.equal(a, named[f"base_model.model.{module}.lora_A.weight"])
            assert torch.equal(b.T, named[f"base_model.model.{module}.lora_B.weight"])


def test_any_mix_in_one_call_equals_each_alone(engine):
    """Ranks and targets that differ, the base among them, in an order in which no adapter's sequences lie together."""
    adapters = [None, *(random_adapter(engine, config, seed=i) for i, config in enumerate(CONFIGS.values()))]
    batch = oracle.sequences([5 + 3 * (i % 7) for i in range(4 * len(adapters))], seed=4)
    chosen = [adapters[i % len(adapters)] for i in range(len(batch))]
    mixed, logits = engine.score(batch, adapters=chosen), engine.logits(batch, adapters=chosen)
    for ids, adapter, score, own in zip(batch, chosen, mixed, logits, strict=True):
        assert relative_error(score, engine.score([ids], adapters=adapter)[0]) < 1e-5
        assert relative_error(own, engine.logits([ids], adapters=[adapter])[0]) < 1e-5
        truth = own.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        assert relative_error(score, truth) < 1e-5
    assert relative_error(engine.score(batch[:1])[0], mixed[0]) < 1e-5
    assert relative_error(engine.score(batch[:1], adapters=adapters[1])[0], mixed[0]) > 1e-4


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([None], r"adapters: found list .*; accepted: an Adapter or None, or a list of 2 of them"),
        (3, "adapters: found int 3"),
        ([None, "a"], r"adapters\[1\]: found str 'a'; accepted: an Adapter or None"),
    ],
)
def test_adapters_that_are_none(engine, adapters, message):
    with pytest.raises(InputError, match=message):
        engine.score([[1, 2], [3, 4]], adapters=adapters)


def test_an_adapter_of_another_model_is_refused(engine, checkpoint):
    """Its layout is of other sizes: it would be read as numbers in the wrong places."""
    other = random_adapter(Engine.from_pretrained(checkpoint("qwen2"), device="cpu"), LoraConfig())
    for call in (
        lambda: engine.score([[1, 2], [3, 4]], adapters=[None, other]),
        lambda: engine.logits([[1, 2]], adapters=other),
        lambda: engine.merge(other),
    ):
        with pytest.raises(InputError, match=r"adapter.*another model"):
            call()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_weights_give_the_adapters_logits(name, checkpoint, tmp_path):
    engine = Engine.from_pretrained(checkpoint(name), device="cpu")
    adapter = random_adapter(engine, CONFIGS["patterns"])
    before = engine.logits(SEQUENCES)
    wanted = engine.logits(SEQUENCES, adapters=adapter)
    params = adapter.params.clone()
    engine.merge(adapter)
    assert torch.equal(adapter.params, params)
    same_logits(engine.logits(SEQUENCES), wanted, before)
    engine.save_pretrained(tmp_path / "merged")
    theirs = oracle.logits(oracle.load(tmp_path / "merged", torch.float32), SEQUENCES)
    same_logits(theirs, wanted, before)


def test_merging_rounds_once(checkpoint, tmp_path):
    """bfloat16: each weight is its sum with the update in float32, rounded; others keep their bits."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu", dtype="bfloat16")
    adapter = random_adapter(engine, CONFIGS["single layers"])
    before = {name: tensor.clone() for name, tensor in engine.model.named_tensors()}
    engine.merge(adapter)
    after = dict(engine.model.named_tensors())
    changed = set()
    for module, a, b, scale in adapter.projections_with_scales():
        weight = f"{module}.weight"
        changed.add(weight)
        assert not torch.equal(after[weight], before[weight])
        merged = torch.addmm(before[weight].float(), b.T, a, alpha=scale)
        assert torch.equal(after[weight], merged.bfloat16())
        exact = before[weight].double() + scale * (b.double().T @ a.double())
        assert relative_error(merged, exact) < 1e-6
    assert len(changed) == 2
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - changed)
    engine.save_pretrained(tmp_path / "merged")
    theirs = oracle.load(tmp_path / "merged", torch.bfloat16).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float32", math.nan), ("float32", math.inf), ("float32", 3e38), ("float16", 1e5), ("bfloat16", math.nan)],
    ids=["NaN", "infinite", "a product beyond float32", "a sum beyond float16", "NaN in 16 bits"],
)
def test_a_merge_that_would_ruin_a_weight_changes_nothing(checkpoint, dtype, value):
    """In the last projection, too: those before it are finite and must not be merged alone."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu", dtype=dtype)
    adapter = random_adapter(engine, LoraConfig(r=2, lora_alpha=64))
    *_, (last, a, b) = adapter.projections()
    a[0, 0], b[0, 0] = 1.0, value
    before = {name: tensor.clone() for name, tensor in engine.model.named_tensors()}
    version = engine.model.version
    with pytest.raises(InputError, match=f"adapter: {last}: merged, its weight is NaN or infinite"):
        engine.merge(adapter)
    assert engine.model.version == version
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.named_tensors())


def test_merge_takes_adapters_only(engine):
    with pytest.raises(InputError, match="adapter: found NoneType None; accepted: an Adapter"):
        engine.merge(None)


@pytest.mark.parametrize("form", ["LoraConfig", "adapter_config.json", "PEFT's own"])
def test_tensors_and_a_config_in_place_of_a_directory(engine, form, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=True)
    adapter = random_adapter(engine, config)
    adapter.save(tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    given = {
        "LoraConfig": config,
        "adapter_config.json": json.loads((tmp_path / "ours" / CONFIG).read_text()),
        "PEFT's own": PeftConfig.from_pretrained(tmp_path / "ours").to_dict(),  # its names are sets
    }[form]
    again = engine.load_adapter(tensors, given)
    assert torch.equal(again.params, adapter.params)
    assert (again.layout.scales == adapter.layout.scales).all()
    for broken, config, message in (
        (tensors, None, "config: found NoneType"),
        (tensors, {}, "config: peft_type: found None"),
        (tensors | {NO_SUCH: torch.ones(1)}, given, f"tensors: tensor {NO_SUCH} has no place"),
        (tensors | {Q0: [[1.0]]}, given, f"tensors: tensor {Q0}: found list"),
        ({}, given, f"tensors: tensor {Q0} is missing"),
        (tmp_path / "ours", given, "config: found .*; accepted: none beside a directory"),
        (None, None, "path: found NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            engine.load_adapter(broken, config)


def test_an_adapter_names_its_base(checkpoint, tmp_path):
    """PEFT's auto classes look for the base there; trained and loaded adapters name it as created ones do."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    random_adapter(engine, LoraConfig()).save(tmp_path / "created")
    engine.load_adapter(tmp_path / "created").copy().save(tmp_path / "loaded")
    (result,) = engine.train([TrainJob([[1, 2, 3]], num_epochs=1)], progress=False)
    result.adapter.save(tmp_path / "trained")
    for name in ("created", "loaded", "trained"):
        config = json.loads((tmp_path / name / CONFIG).read_text())
        assert config["base_model_name_or_path"] == str(checkpoint("llama"))
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name).eval()
        ours = engine.logits(SEQUENCES, adapters=engine.load_adapter(tmp_path / name))
        for mine, theirs in zip(ours, oracle.logits(model, SEQUENCES), strict=True):
            assert relative_error(mine, theirs) < 1e-5


# Broken directories


def changed_json(**fields):
    def change(directory):
        raw = json.loads((directory / CONFIG).read_text()) | fields
        (directory / CONFIG).write_text(json.dumps(raw))

    return change


def changed_tensors(change):
    def write(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return write


def only_pickled(directory):
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(b"pickled")


def truncated(directory):
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


BROKEN = {
    "no directory": (shutil.rmtree, CONFIG, "missing"),
    "no config": (lambda d: (d / CONFIG).unlink(), CONFIG, "missing"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), WEIGHTS, "missing"),
    "pickled weights": (only_pickled, WEIGHTS, r"missing; pickled adapters \(\.bin\) are not read"),
    "truncated": (truncated, WEIGHTS, "not a readable safetensors file"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), WEIGHTS, "not a readable safetensors file"),
    "weights are a directory": (
        lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), WEIGHTS, "not a readable safetensors file",
    ),
    "config not JSON": (lambda d: (d / CONFIG).write_text("r = 8"), CONFIG, "not JSON"),
    "config a list": (lambda d: (d / CONFIG).write_text("[]"), CONFIG, "found list"),
    "config not UTF-8": (lambda d: (d / CONFIG).write_bytes(b"\xff{}"), CONFIG, "not UTF-8"),
    "other r": (changed_json(r=3), WEIGHTS, rf"tensor {Q0}: found torch.float32 \[2, 48\]; accepted: \[3, 48\]"),
    "transposed": (
        changed_tensors(lambda t: t.update({Q0: t[Q0].T.contiguous()})), WEIGHTS, rf"tensor {Q0}: found .*\[48, 2\]",
    ),
    "integers": (changed_tensors(lambda t: t.update({Q0: t[Q0].int()})), WEIGHTS, rf"tensor {Q0}: found torch.int32"),
    "missing tensor": (changed_tensors(lambda t: t.pop(Q0)), WEIGHTS, f"tensor {Q0} is missing"),
    "extra tensor": (
        changed_tensors(lambda t: t.update({NO_SUCH: t[Q0].clone()})), WEIGHTS, f"tensor {NO_SUCH} has no place",
    ),
    "fewer targets": (changed_json(target_modules=["v_proj"]), WEIGHTS, f"tensor {Q0} has no place"),
    "DoRA": (changed_json(use_dora=True), CONFIG, "use_dora: found True; accepted: null or false"),
    "QALoRA": (changed_json(use_qalora=True), CONFIG, "use_qalora: found True"),
    "aLoRA": (changed_json(alora_invocation_tokens=[5]), CONFIG, r"alora_invocation_tokens: found \[5\]"),
    "bias": (changed_json(bias="all"), CONFIG, "bias: found 'all'; accepted: 'none'"),
    "lora_bias": (changed_json(lora_bias=True), CONFIG, "lora_bias: found True"),
    "modules_to_save": (changed_json(modules_to_save=["lm_head"]), CONFIG, r"modules_to_save: found \['lm_head'\]"),
    "fewer layers": (changed_json(layers_to_transform=[0]), WEIGHTS, r"tensor \S+layers\.1\S+ has no place"),
    "another method": (changed_json(peft_type="IA3"), CONFIG, "peft_type: found 'IA3'; accepted: 'LORA'"),
    "no method": (changed_json(peft_type=None), CONFIG, "peft_type: found None"),
    "r = 0": (changed_json(r=0), CONFIG, r"lora\.r: found 0; accepted: an integer >= 1"),
    "r = 2.0": (changed_json(r=2.0), CONFIG, r"lora\.r: found 2\.0"),
    "alpha": (changed_json(lora_alpha=math.inf), CONFIG, r"lora\.lora_alpha: found inf"),
    "dropout": (changed_json(lora_dropout=1), CONFIG, r"lora\.lora_dropout: found 1"),
    "rslora": (changed_json(use_rslora="yes"), CONFIG, "use_rslora: found 'yes'"),
    "unknown targets": (changed_json(target_modules=["c_fc"]), CONFIG, "target_modules: found .*match no module"),
    "target is lm_head": (changed_json(target_modules=["lm_head"]), CONFIG, r"target_modules: found \['lm_head'\]"),
    "targets no names": (changed_json(target_modules={"q_proj": 1}), CONFIG, "target_modules: found"),
    "targets numbers": (changed_json(target_modules=[1]), CONFIG, r"target_modules: found list \[1\]"),
    "no targets": (changed_json(target_modules=[]), CONFIG, "target_modules: found"),
    "target no regex": (changed_json(target_modules="(q_proj"), CONFIG, r"target_modules: found '\(q_proj', no regu"),
    "rank_pattern no regex": (changed_json(rank_pattern={"(q": 2}), CONFIG, r"rank_pattern: found '\(q', no regular"),
    "alpha_pattern no regex": (changed_json(alpha_pattern={"*": 2}), CONFIG, r"alpha_pattern: found '\*', no regular"),
    "rank_pattern a list": (changed_json(rank_pattern=[4]), CONFIG, r"rank_pattern: found \[4\]"),
    "rank 0": (changed_json(rank_pattern={"q_proj": 0}), CONFIG, r"rank_pattern\['q_proj'\]: found 0"),
    "alpha a text": (changed_json(alpha_pattern={"q_proj": "8"}), CONFIG, r"alpha_pattern\['q_proj'\]: found '8'"),
}  # fmt: skip


@pytest.mark.parametrize("label", BROKEN)
def test_broken_directories(engine, label, tmp_path):
    change, file, message = BROKEN[label]
    directory = tmp_path / "adapter"
    random_adapter(engine, LoraConfig(r=2)).save(directory)
    assert isinstance(engine.load_adapter(directory), Adapter)
    change(directory)
    with pytest.raises(InputError, match=message) as caught:
        engine.load_adapter(directory)
    assert str(caught.value).startswith(f"{directory / file}: ")


def test_16_bit_tensors_are_read(engine, tmp_path):
    """As PEFT writes them when the adapter was cast."""
    adapter = random_adapter(engine, LoraConfig(r=2))
    adapter.save(tmp_path)
    changed_tensors(lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))(tmp_path)
    assert torch.equal(engine.load_adapter(tmp_path).params, adapter.params.bfloat16().float())


def test_nothing_is_overwritten(engine, tmp_path):
    adapter = random_adapter(engine, LoraConfig())
    adapter.save(tmp_path / "adapter")
    before = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="accepted: a new or empty directory"):
        random_adapter(engine, LoraConfig(), seed=1).save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(r=0), r"lora\.r: found 0"),
        (dict(r=True), r"lora\.r: found True"),
        (dict(lora_alpha=math.nan), r"lora\.lora_alpha: found nan"),
        (dict(lora_dropout=-0.1), r"lora\.lora_dropout: found -0\.1"),
        (dict(target_modules=()), r"lora\.target_modules: found \(\)"),
        (dict(target_modules=None), r"lora\.target_modules: found None"),
        (dict(target_modules=("self_attn",)), r"lora\.target_modules: found \['self_attn'\], which match no module"),
        (dict(target_modules="q_proj"), r"lora\.target_modules: found \['q_proj'\]"),  # a regex for whole names
        (dict(target_modules="["), r"lora\.target_modules: found '\[', no regular expression"),
        (dict(rank_pattern={"[": 3}), r"lora\.rank_pattern: found '\[', no regular expression"),
        (dict(rank_pattern={"q_proj": 1.5}), r"lora\.rank_pattern\['q_proj'\]: found 1\.5"),
    ],
)
def test_configs_that_are_refused(engine, fields, message):
    with pytest.raises(InputError, match=message):
        engine.create_adapter(LoraConfig(**fields))


# In memory


def test_parameters_start_as_pefts_do(engine):
    """A: U(-1, 1) / sqrt(inputs); B zero. The same seed draws the same bits, another seed others."""
    config = LoraConfig(r=64, target_modules=SEVEN)
    adapter, again, other = (engine.create_adapter(config, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(adapter.params, again.params)
    for (module, a, b), (_, different, _) in zip(adapter.projections(), other.projections(), strict=True):
        bound = a.shape[1] ** -0.5
        assert not b.any()
        assert a.abs().max() <= bound
        assert not torch.equal(a, different)
        # Of n uniform numbers: the mean's deviation is 1 / sqrt(3 n), the mean square's 2 / sqrt(45 n).
        n, unit = a.numel(), a / bound
        assert abs(unit.mean()) < 5 / (3 * n) ** 0.5, module
        assert abs(unit.square().mean() - 1 / 3) < 5 * 2 / (45 * n) ** 0.5, module
        assert unit.max() > 1 - 20 / n
        assert unit.min() < -1 + 20 / n
    first, second = (a for _, a, _ in list(adapter.projections())[:2])
    assert not torch.equal(first, second), "projections of one shape draw different numbers"
    theirs = PeftConfig(r=64, target_modules=["q_proj"])
    peft = get_peft_model(oracle.make_model("llama"), theirs)
    drawn = torch.cat([p.detach().flatten() for n, p in peft.named_parameters() if "lora_A" in n])
    ours = torch.cat([a.flatten() for name, a, _ in adapter.projections() if name.endswith("q_proj")])
    assert drawn.numel() == ours.numel()
    assert drawn.abs().max().item() == pytest.approx(ours.abs().max().item(), rel=1e-2)
    assert drawn.std().item() == pytest.approx(ours.std().item(), rel=3e-2)


@pytest.mark.parametrize("label", CONFIGS)
def test_layouts(engine, label):
    """Parts are aligned, apart from one another, and cover what is not padding."""
    adapter = engine.create_adapter(CONFIGS[label])
    layout = adapter.layout
    assert (layout.offsets % ALIGNMENT == 0).all()
    assert layout.size % ALIGNMENT == 0
    owner = torch.zeros(layout.size, dtype=torch.int64)
    count = 0
    for _, a, b in adapter.projections(owner):
        for part in (a, b):
            part += 1
            count += part.numel()
    assert owner.max() == 1
    assert owner.sum() == count == layout.num_parameters
    assert layout.size - count < ALIGNMENT * layout.offsets.size
    assert adapter.params.shape == (layout.size,)
    assert adapter.params.dtype == torch.float32


def test_memory_is_linear(engine):
    """n adapters hold n times layout.size floats each for parameters; four times that while they are trained."""
    config = LoraConfig(r=5, target_modules=SEVEN)
    adapters = [engine.create_adapter(config, seed=i) for i in range(10)]
    held = {a.params.untyped_storage().data_ptr(): a.params.untyped_storage().nbytes() for a in adapters}
    assert len(held) == 10
    assert sum(held.values()) == 10 * adapters[0].layout.size * 4
    assert len({id(adapter.layout) for adapter in adapters}) == 1, "adapters of one config share its layout"
    adapter = adapters[0]
    assert adapter.grads is None
    assert adapter.moments is None
    adapter.allocate_optimizer_state()
    assert {t.untyped_storage().data_ptr() for t in adapter.moments} == {adapter.grads.untyped_storage().data_ptr()}
    assert adapter.grads.untyped_storage().nbytes() == 3 * adapter.layout.size * 4
    assert not any(t.any() for t in (adapter.grads, *adapter.moments))
    adapter.release_optimizer_state()
    assert adapter.grads is None
    assert adapter.moments is None


def test_a_copy_is_its_own(engine):
    adapter = random_adapter(engine, CONFIGS["patterns"])
    adapter.allocate_optimizer_state()
    copy = adapter.copy()
    assert torch.equal(copy.params, adapter.params)
    assert copy.grads is None
    assert copy.uid != adapter.uid
    copy.params.zero_()
    assert adapter.params.any()


def test_parameters_changed_in_place_are_told_by_touch(engine):
    """The sampler's prefix cache knows an adapter by uid and version: without `touch` it would reuse old K/V."""
    adapter, prompt = random_adapter(engine, CONFIGS["seven"]), list(range(5, 60))
    sampler = engine.sampler(num_blocks=16)
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=1)

    def logprobs():
        request = sampler.add_request(None, prompt, params, adapter)
        while sampler.busy:
            sampler.step()
        return sampler.output(request).outputs[0].logprobs

    before = logprobs()
    adapter.params.mul_(3)
    adapter.touch()
    assert adapter.version == 1
    after = logprobs()
    assert after != before
    fresh = engine.generate([prompt], params, adapter.copy(), progress=False)[0].outputs[0].logprobs
    assert after == pytest.approx(fresh)


def test_uids_are_unique(engine, tmp_path):
    adapters = [random_adapter(engine, LoraConfig()) for _ in range(3)]
    adapters[0].save(tmp_path)
    adapters += [adapters[0].copy(), engine.load_adapter(tmp_path), engine.load_adapter(tmp_path)]
    assert len({adapter.uid for adapter in adapters}) == len(adapters)
    assert {adapter.version for adapter in adapters} == {0}
