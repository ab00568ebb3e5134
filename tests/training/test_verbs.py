"""The two verbs against torch autograd on Transformers and PEFT; the trainer as an object; resumed jobs."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import oracle
from compare import relative_error
from seal_engine import AdamParams, Adapter, Datum, Engine, InputError, LoraConfig, TrainJob
from seal_engine.model.adapter_layout import adapter_layout
from seal_engine.plan import HEADROOM, activation_bytes
from seal_engine.training import trainer as train
from seal_engine.training.losses import datum_loss
from seal_engine.training.verbs import forward_backward

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS = [
    LoraConfig(r=1, target_modules=("q_proj", "v_proj")),
    LoraConfig(r=6, lora_alpha=9, target_modules=SEVEN),
    LoraConfig(r=3, target_modules=("o_proj", "down_proj"), use_rslora=True),
]


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_pretrained(checkpoint("llama"), device="cpu")


def random_adapter(engine, config=CONFIGS[1], seed=0):
    """B random too, so that the gradient of A is not zero."""
    adapter = engine.create_adapter(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, _, b in adapter.projections():
        b.normal_(0, 0.1, generator=generator)
    return adapter


def numbers(n, seed):
    return torch.empty(n).uniform_(-1, 2, generator=torch.Generator().manual_seed(seed)).tolist()


def entropy_like(logprobs):
    """A loss whose gradient depends on the log-probabilities."""
    return (logprobs * logprobs.exp()).sum() + logprobs.min()


def autograd(peft, datum):
    """(loss, log-probabilities) of a datum as PEFT's model and plain torch have them; its gradients are added."""
    logits = peft(input_ids=torch.tensor([datum.token_ids])).logits[0, :-1]
    targets = datum.token_ids if datum.target_tokens is None else datum.target_tokens
    targets = torch.tensor(targets)[-len(logits) :]
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    if callable(datum.loss):
        loss = datum.loss(logprobs)
    else:
        n = len(logprobs)
        weights = torch.full((n,), 1 / n) if datum.weights is None else torch.tensor(datum.weights)[-n:]
        terms = -logprobs
        if datum.loss == "importance_sampling":
            ratio = (logprobs - torch.tensor(datum.old_logprobs)[-n:]).exp()
            terms = -ratio * torch.tensor(datum.advantages)[-n:]
        loss = (weights * terms).sum()
    loss.backward()
    return loss.detach(), logprobs.detach()


def some_data(adapter, seed):
    """Every loss, with fields of n and of n - 1 entries, for one adapter."""
    first, second, third, fourth, fifth, sixth = oracle.sequences([9, 14, 2, 21, 6, 11], seed=seed)
    return [
        Datum(adapter, first),
        Datum(adapter, second, weights=numbers(14, seed)),
        Datum(adapter, third, weights=numbers(1, seed + 1)),
        Datum(adapter, fourth, entropy_like),
        Datum(
            adapter, fifth, "importance_sampling", weights=numbers(5, seed + 2),
            old_logprobs=[-7 + x for x in numbers(6, seed + 3)], advantages=numbers(5, seed + 4),
        ),
        Datum(
            adapter, sixth, "importance_sampling",
            old_logprobs=[-7 + x for x in numbers(10, seed + 5)], advantages=numbers(11, seed + 6),
            target_tokens=second[:10],
        ),
        Datum(adapter, first, weights=numbers(8, seed + 7), target_tokens=second[:9]),
    ]  # fmt: skip


def gradients(adapter):
    return list(adapter.projections(adapter.grads))


@pytest.mark.parametrize("name", ["llama-biases-tied", "mistral-window", "qwen2", "qwen3"])
def test_every_loss_equals_autograd(name, checkpoint, tmp_path):
    """Several adapters and all losses in one call, the data of the adapters interleaved."""
    engine = Engine.from_pretrained(checkpoint(name), device="cpu")
    adapters = [random_adapter(engine, config, seed=i) for i, config in enumerate(CONFIGS)]
    own = [some_data(adapter, seed=10 * i) for i, adapter in enumerate(adapters)]
    data = [datum for together in zip(*own, strict=True) for datum in together]
    results = engine.forward_backward(data)
    assert len(results) == len(data)
    for i, adapter in enumerate(adapters):
        adapter.save(tmp_path / str(i))
        base = oracle.load(checkpoint(name), torch.float32)
        peft = PeftModel.from_pretrained(base, tmp_path / str(i), is_trainable=True).eval()
        for datum, result in zip(data, results, strict=True):
            if datum.adapter is adapter:
                loss, logprobs = autograd(peft, datum)
                assert result.loss == pytest.approx(loss.item(), rel=1e-5)
                assert relative_error(result.logprobs, logprobs) < 1e-5
                assert result.logprobs.dtype == torch.float32
                assert not result.logprobs.requires_grad
        truth = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.requires_grad}
        for module, da, db in gradients(adapter):
            assert relative_error(da, truth[f"base_model.model.{module}.lora_A.weight"]) < 1e-5
            assert relative_error(db.T, truth[f"base_model.model.{module}.lora_B.weight"]) < 1e-5


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "callable"])
def test_a_loss_by_itself_adds_up(loss, engine):
    """Two calls before a step are one call with both, and one datum a pass is all of them in one."""
    data = [d for d in some_data(None, seed=3) if (d.loss if isinstance(d.loss, str) else "callable") == loss]

    def run(parts, budget):
        adapter = random_adapter(engine)
        results = []
        for part in parts:
            given = [replace(d, adapter=adapter) for d in part]
            results += forward_backward(engine.model, given, budget)
        return results, adapter

    together, first = run([data + data], 10_000)
    for parts, budget in (([data, data], 10_000), ([data + data], 1)):
        apart, second = run(parts, budget)
        assert [r.loss for r in apart] == pytest.approx([r.loss for r in together], rel=1e-5)
        assert relative_error(second.grads, first.grads) < 1e-5
    assert first.grads.any()


def test_forward_is_forward_backward_without_gradients(engine):
    """The same pass, so the same losses and log-probabilities; the adapter stays as it is."""
    adapter = random_adapter(engine)
    data = some_data(adapter, seed=4)
    results = engine.forward(data)
    assert adapter.grads is None
    for ours, theirs in zip(results, engine.forward_backward(data), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert relative_error(ours.logprobs, theirs.logprobs) < 1e-6


@pytest.mark.parametrize(
    ("target_tokens", "message"),
    [([1, 2, 3, 4], r"target_tokens: found .*4 entries.*accepted: 3 or 2"), ([1, 10**6], r"target_tokens: token 1")],
    ids=["one too many", "outside the vocabulary"],
)
def test_bad_target_tokens(target_tokens, message, engine):
    """Named before anything is computed."""
    adapter = random_adapter(engine)
    with pytest.raises(InputError, match=message):
        engine.forward_backward([Datum(adapter, [1, 2, 3], target_tokens=target_tokens)])
    assert adapter.grads is None


def test_tensors_and_arrays_are_taken(engine):
    ids, weights = oracle.sequences([8])[0], numbers(8, 0)
    plain, given = random_adapter(engine), random_adapter(engine)
    first = engine.forward_backward([Datum(plain, ids, weights=weights)])
    second = engine.forward_backward([Datum(given, torch.tensor(ids), weights=torch.tensor(weights).numpy())])
    assert first[0].loss == second[0].loss
    assert torch.equal(plain.grads, given.grads)


def test_no_data_and_no_steps(engine):
    assert engine.forward_backward([]) == []
    assert engine.optim_step([]) == []


HYPERS = [
    AdamParams(1e-2),
    AdamParams(3e-3, betas=(0.5, 0.9), eps=1e-5, weight_decay=0.1, max_grad_norm=0.05),
    AdamParams(1e-3, weight_decay=0.01, max_grad_norm=1e6),
]


def test_steps_equal_torchs(engine):
    """Six steps of AdamW of three adapters in one call, each with its own hyper-parameters."""
    adapters = [random_adapter(engine, config, seed=i) for i, config in enumerate(CONFIGS)]
    masters = [adapter.params.clone().requires_grad_() for adapter in adapters]
    theirs = [
        torch.optim.AdamW([p], h.learning_rate, h.betas, h.eps, h.weight_decay, foreach=False)
        for p, h in zip(masters, HYPERS, strict=True)
    ]
    clipped = set()
    for step in range(6):
        data = [Datum(a, ids) for a, ids in zip(adapters, oracle.sequences([12, 7, 30], seed=step), strict=True)]
        engine.forward_backward(data)
        for i, (adapter, master, optimizer) in enumerate(zip(adapters, masters, theirs, strict=True)):
            master.grad = adapter.grads.clone()
            if HYPERS[i].max_grad_norm is not None:
                before = torch.nn.utils.clip_grad_norm_([master], HYPERS[i].max_grad_norm, foreach=False)
                clipped |= {i} if before > HYPERS[i].max_grad_norm else set()
            optimizer.step()
        wanted = [adapter.grads.double().norm().item() for adapter in adapters]
        norms = engine.optim_step(list(zip(adapters, HYPERS, strict=True)))
        assert norms == pytest.approx(wanted, rel=1e-5)
        for adapter, master, optimizer in zip(adapters, masters, theirs, strict=True):
            assert relative_error(adapter.params, master) < 1e-6
            state = optimizer.state[master]
            assert relative_error(adapter.moments[0], state["exp_avg"]) < 1e-5
            assert relative_error(adapter.moments[1], state["exp_avg_sq"]) < 1e-5
            assert not adapter.grads.any()
            assert adapter.steps == adapter.version == step + 1
    assert clipped == {1}


def test_adapters_that_are_left_alone_keep_their_bits(engine):
    data, bystander = some_data(random_adapter(engine), seed=0), random_adapter(engine, seed=1)
    engine.forward_backward([Datum(bystander, [1, 2, 3])])
    params, grads = bystander.params.clone(), bystander.grads.clone()
    base = {name: tensor.clone() for name, tensor in engine.model.named_tensors()}
    engine.forward_backward(data)
    engine.optim_step([(data[0].adapter, AdamParams(1e-2))])
    assert torch.equal(bystander.params, params)
    assert torch.equal(bystander.grads, grads)
    assert (bystander.steps, bystander.version) == (0, 0)
    assert all(torch.equal(tensor, base[name]) for name, tensor in engine.model.named_tensors())
    padding = torch.ones_like(params, dtype=torch.bool)
    for _, a, b in bystander.projections(padding):
        a.zero_(), b.zero_()
    assert padding.any()
    assert not data[0].adapter.params[padding].any()


def test_an_infinite_gradient_changes_nothing(engine):
    """And the step after it is the first."""
    adapters = [random_adapter(engine), random_adapter(engine)]
    for bad in (math.inf, math.nan):
        before = adapters[0].params.clone()
        engine.forward_backward([Datum(adapters[0], [1, 2, 3], lambda logprobs, x=bad: logprobs.sum() * x)])
        (norm,) = engine.optim_step([(adapters[0], AdamParams())])
        assert not math.isfinite(norm)
        assert torch.equal(adapters[0].params, before)
    for adapter in adapters:
        engine.forward_backward([Datum(adapter, [1, 2, 3])])
        engine.optim_step([(adapter, AdamParams())])
    assert torch.equal(adapters[0].params, adapters[1].params)
    assert adapters[0].steps == 1


IDS = [1, 2, 3]
BAD_DATA = {
    "no datum": (lambda a: ("text"), r"data\[1\]: found 'text'; accepted: a Datum"),
    "no adapter": (lambda a: Datum(None, IDS), r"data\[1\]\.adapter: found None; accepted: an Adapter"),
    "one token": (lambda a: Datum(a, [5]), r"data\[1\]\.token_ids: found \[5\]; accepted: at least two tokens"),
    "no token": (lambda a: Datum(a, []), r"data\[1\]\.token_ids: found no token"),
    "text": (lambda a: Datum(a, "one two"), r"data\[1\]\.token_ids: found str"),
    "floats": (lambda a: Datum(a, [1.0, 2.0]), r"data\[1\]\.token_ids: found list"),
    "an id too large": (lambda a: Datum(a, [1, 1009]), r"data\[1\]\.token_ids: token 1: found id int 1009"),
    "an id below 0": (lambda a: Datum(a, [-1, 2]), r"data\[1\]\.token_ids: token 0: found id int -1"),
    "too long": (lambda a: Datum(a, [1] * 513), r"data\[1\]\.token_ids: found 513 tokens; accepted: at most 512"),
    "unknown loss": (lambda a: Datum(a, IDS, "mse"), r"data\[1\]\.loss: found 'mse'; accepted: one of"),
    "loss a number": (lambda a: Datum(a, IDS, 3), r"data\[1\]\.loss: found 3"),
    "weights too short": (lambda a: Datum(a, IDS, weights=[1]), r"data\[1\]\.weights: found '1 entries'; .*3 or 2"),
    "weights too long": (lambda a: Datum(a, IDS, weights=[1] * 4), r"data\[1\]\.weights: found '4 entries'"),
    "weights NaN": (lambda a: Datum(a, IDS, weights=[1, math.nan, 1]), r"data\[1\]\.weights: .*finite numbers"),
    "weights infinite": (lambda a: Datum(a, IDS, weights=[1, -math.inf]), r"data\[1\]\.weights: .*finite numbers"),
    "weights a number": (lambda a: Datum(a, IDS, weights=1.0), r"data\[1\]\.weights: found 1\.0; accepted: 3 or 2"),
    "weights texts": (lambda a: Datum(a, IDS, weights=["a", "b"]), r"data\[1\]\.weights: found \['a', 'b'\]"),
    "weights nested": (lambda a: Datum(a, IDS, weights=[[1], [1]]), r"data\[1\]\.weights: found \[\[1\], \[1\]\]"),
    "no advantages": (
        lambda a: Datum(a, IDS, "importance_sampling", old_logprobs=[0, 0]), r"data\[1\]\.advantages: found None",
    ),
    "no old log-probabilities": (
        lambda a: Datum(a, IDS, "importance_sampling", advantages=[0, 0]), r"data\[1\]\.old_logprobs: found None",
    ),
    "weights of a callable": (
        lambda a: Datum(a, IDS, entropy_like, weights=[1, 1]), r"data\[1\]\.weights: .*None with a callable loss",
    ),
    "a callable's vector": (
        lambda a: Datum(a, IDS, lambda logprobs: logprobs), r"data\[1\]\.loss: the callable returned .*a scalar tensor",
    ),
    "a callable's float": (
        lambda a: Datum(a, IDS, lambda logprobs: 1.0), r"data\[1\]\.loss: the callable returned 1\.0",
    ),
    "a callable's constant": (
        lambda a: Datum(a, IDS, lambda logprobs: logprobs.detach().sum()), r"data\[1\]\.loss: the callable returned",
    ),
}  # fmt: skip


@pytest.mark.parametrize("budget", [1, 10_000])
@pytest.mark.parametrize("label", BAD_DATA)
def test_bad_data(engine, label, budget):
    """The message names the datum, and nothing is added to any gradient, that of data before it included."""
    make, message = BAD_DATA[label]
    first, second = random_adapter(engine), random_adapter(engine, seed=1)
    forward_backward(engine.model, [Datum(first, IDS)], 10_000)
    before = first.grads.clone()
    assert before.any()
    with pytest.raises(InputError, match=message):
        forward_backward(engine.model, [Datum(first, [4, 5, 6]), make(second), Datum(second, IDS)], budget)
    assert torch.equal(first.grads, before)
    assert second.grads is None, "as if it had not been there"


def test_an_error_of_a_callables_own_changes_nothing(engine):
    adapter = random_adapter(engine)
    forward_backward(engine.model, [Datum(adapter, IDS)], 1)
    before = adapter.grads.clone()

    def fails(logprobs):
        raise ZeroDivisionError("its own")

    with pytest.raises(ZeroDivisionError, match="its own"):
        forward_backward(engine.model, [Datum(adapter, [4, 5]), Datum(adapter, IDS, fails)], 1)
    assert torch.equal(adapter.grads, before)


def test_an_adapter_of_another_model(engine, checkpoint):
    other = random_adapter(Engine.from_pretrained(checkpoint("qwen2"), device="cpu"))
    with pytest.raises(InputError, match=r"data\[0\]\.adapter: an adapter of another model"):
        engine.forward_backward([Datum(other, IDS)])
    result = engine.train([TrainJob([IDS], init_from=other)], progress=False)[0]
    assert result.error is not None
    assert result.error.startswith("init_from: an adapter of another model")


@pytest.mark.parametrize("data", [None, "text", 3, Datum(None, [1, 2])])
def test_data_that_are_no_list(engine, data):
    with pytest.raises(InputError, match=r"data: found .*; accepted: a list of Datum"):
        engine.forward_backward(data)


BAD_STEPS = {
    "no pair": (lambda a, b: a, r"steps\[1\]: found .*; accepted: \(Adapter, AdamParams\)"),
    "three": (lambda a, b: (a, AdamParams(), 1), r"steps\[1\]: found .*; accepted: \(Adapter, AdamParams\)"),
    "no adapter": (lambda a, b: ("a", AdamParams()), r"steps\[1\]: found \('a', .*accepted: \(Adapter"),
    "no parameters": (lambda a, b: (a, 1e-3), r"steps\[1\]: found .*; accepted: \(Adapter, AdamParams\)"),
    "twice": (lambda a, b: (b, AdamParams()), r"steps\[1\]: adapter \d+ is in the list twice"),
    "without gradients": (lambda a, b: (a, AdamParams()), r"steps\[1\]: adapter \d+ has no gradients"),
    "negative rate": (lambda a, b: (a, AdamParams(-1e-3)), r"steps\[1\]\.learning_rate: found -0\.001"),
    "NaN rate": (lambda a, b: (a, AdamParams(math.nan)), r"steps\[1\]\.learning_rate: found nan"),
    "beta 1": (lambda a, b: (a, AdamParams(betas=(0.9, 1.0))), r"steps\[1\]\.betas: found \(0\.9, 1\.0\)"),
    "three betas": (lambda a, b: (a, AdamParams(betas=(0.9, 0.9, 0.9))), r"steps\[1\]\.betas"),
    "eps": (lambda a, b: (a, AdamParams(eps="1e-8")), r"steps\[1\]\.eps: found '1e-8'"),
    "weight decay": (lambda a, b: (a, AdamParams(weight_decay=math.inf)), r"steps\[1\]\.weight_decay: found inf"),
    "norm 0": (lambda a, b: (a, AdamParams(max_grad_norm=0)), r"steps\[1\]\.max_grad_norm: found 0"),
}


@pytest.mark.parametrize("label", BAD_STEPS)
def test_bad_steps(engine, label):
    """The message names the entry, and no adapter has moved."""
    make, message = BAD_STEPS[label]
    idle, good = random_adapter(engine), random_adapter(engine, seed=1)
    engine.forward_backward([Datum(good, IDS)])
    params, grads = good.params.clone(), good.grads.clone()
    with pytest.raises(InputError, match=message):
        engine.optim_step([(good, AdamParams()), make(idle, good)])
    assert torch.equal(good.params, params)
    assert torch.equal(good.grads, grads)
    assert (good.steps, good.version) == (0, 0)


# The trainer as an object


def job(seed, epochs=3, r=4, **fields):
    sequences = oracle.sequences([7 + seed % 5, 12, 3], seed=seed)
    lora = LoraConfig(r=r, target_modules=("q_proj", "down_proj"))
    return TrainJob(sequences, **{"lora": lora, "learning_rate": 1e-2, "num_epochs": epochs, "seed": seed, **fields})


def finish(trainer, ids):
    for _ in range(10_000):
        if not trainer.busy:
            return [trainer.poll(i) for i in ids]
        trainer.step()
    raise AssertionError("the trainer does not come to an end")


def same_results(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.error is None
        assert b.error is None
        assert a.losses == b.losses
        assert torch.equal(a.adapter.params, b.adapter.params)


@pytest.fixture(scope="module")
def deterministic(checkpoint):
    return Engine.from_pretrained(checkpoint("llama"), device="cpu", deterministic=True)


def little_memory(engine, jobs):
    """A trainer that has room for the state of the two largest jobs beside a pass's activations, and no more."""
    everywhere = adapter_layout(engine.config, LoraConfig(r=1, target_modules="all-linear"))
    state = 16 * max(adapter_layout(engine.config, job.lora).size for job in jobs)
    memory_bytes = int(activation_bytes(engine.config, everywhere, 64, 4, "none", cpu=True) + 2.5 * state / HEADROOM)
    return engine.trainer(token_budget=64, memory_bytes=memory_bytes, recompute="none")


def test_jobs_wait_for_memory(deterministic):
    """Few at a time, in order of submission, with the results that each has alone."""
    jobs = [job(i, epochs=1 + i % 3, r=1 + i % 4) for i in range(9)]
    wanted = [deterministic.train([j], progress=False)[0] for j in jobs]
    trainer = little_memory(deterministic, jobs)
    ids = [trainer.submit(j) for j in jobs]
    most = 0
    while trainer.busy:
        trainer.step()
        held = sum(16 * run.adapter.layout.size for run in trainer._resident)
        assert trainer.num_resident <= 1 or held <= trainer.state_bytes
        most = max(most, trainer.num_resident)
    assert 2 <= most < 9
    same_results([trainer.result(i) for i in ids], wanted)
    assert trainer.num_done == 9
    trainer = deterministic.trainer(token_budget=64, memory_bytes=1)
    ids = [trainer.submit(j) for j in jobs[:3]]
    for _ in range(3):
        trainer.step()
        assert trainer.num_resident <= 1, "one job is always let in"
    same_results(finish(trainer, ids), wanted[:3])


def test_a_budget_below_every_sequence(deterministic):
    """One sequence a pass: the same steps up to the order of sums."""
    jobs = [job(i, batch_size=2, gradient_accumulation_steps=2) for i in range(3)]
    wanted = deterministic.train(jobs, progress=False)
    passes = deterministic.trainer(token_budget=1)
    ids = [passes.submit(j) for j in jobs]
    for result, want in zip(finish(passes, ids), wanted, strict=True):
        assert result.num_steps == want.num_steps == 3
        assert result.losses == pytest.approx(want.losses, rel=1e-5)
        assert relative_error(result.adapter.params, want.adapter.params) < 1e-4


def test_the_callback_is_called_once_a_step(deterministic):
    calls = []
    jobs = [job(0, epochs=2), job(1, batch_size=2), job(2, gradient_accumulation_steps=3, epochs=4)]
    results = deterministic.train(jobs, callback=lambda *call: calls.append(call), progress=False, token_budget=20)
    assert [r.num_steps for r in results] == [6, 6, 4]
    for i, result in enumerate(results):
        assert [(step, loss) for number, step, loss in calls if number == i] == list(enumerate(result.losses, 1))


def test_the_longest_jobs_are_begun_first(deterministic, monkeypatch):
    """Twelve short jobs and one of nine passes, two to a pass: begun last, the long one would make it 15 passes."""
    passes, calls = [], []
    whole = train.target_logprobs
    monkeypatch.setattr(train, "target_logprobs", lambda *args: passes.append(len(args[1])) or whole(*args))
    sequence = list(range(1, 11))
    jobs = [TrainJob([sequence], CONFIGS[0]) for _ in range(12)] + [TrainJob([sequence] * 3, CONFIGS[0], num_epochs=3)]
    jobs.insert(4, "no job")
    results = deterministic.train(jobs, lambda i, step, _: calls.append((i, step)), progress=False, token_budget=20)
    assert len(passes) == -(-(12 + 9) // 2)
    assert [r.num_steps for r in results] == [1] * 4 + [0] + [1] * 8 + [9]
    assert sorted(calls) == sorted([(i, 1) for i in range(13) if i != 4] + [(13, step) for step in range(1, 10)])


def test_submitting_polling_and_cancelling(deterministic):
    jobs = [job(i) for i in range(5)]
    wanted = deterministic.train([jobs[0], jobs[4]], progress=False)
    trainer = little_memory(deterministic, jobs)
    assert not trainer.busy
    trainer.step()  # nothing to do is no error
    first, second, waiting = (trainer.submit(j) for j in jobs[:3])
    trainer.step()
    assert trainer.busy
    assert trainer.num_resident == 2
    assert trainer.poll(first) is None
    trainer.cancel(second)  # resident: its place is free for the next
    assert trainer.poll(second).error == "cancelled"
    assert trainer.poll(second).adapter is None
    assert len(trainer.poll(second).losses) == 1
    trainer.cancel(waiting)
    assert trainer.poll(waiting).error == "cancelled"
    assert trainer.poll(waiting).losses == []
    third = trainer.submit(jobs[3])
    trainer.cancel(third)  # before it was ever seen
    last = trainer.submit(jobs[4])
    results = finish(trainer, [first, last])
    same_results(results, wanted)
    trainer.cancel(first)  # done stays done
    assert trainer.poll(first) is results[0]
    for unknown in (-1, 5, "0", None, 1.5):
        for call in (trainer.poll, trainer.cancel):
            with pytest.raises(InputError, match=r"job_id: found .*; accepted: an id that submit returned"):
                call(unknown)


@pytest.mark.parametrize("at", [1, 9])
def test_cancelling_in_the_callback(deterministic, at):
    """At any step, its last included; another job goes on."""
    trainer = deterministic.trainer(callback=lambda i, step, _: trainer.cancel(0) if (i, step) == (0, at) else None)
    ids = [trainer.submit(job(i)) for i in range(2)]
    cancelled, other = finish(trainer, ids)
    assert cancelled.error == "cancelled"
    assert len(cancelled.losses) == at
    same_results([other], [deterministic.train([job(1)], progress=False)[0]])


def test_scoring_between_steps_changes_nothing(deterministic):
    """A finished adapter, a resident one and the base are scored while others train."""
    jobs = [job(0, epochs=1), job(1, epochs=4)]
    wanted = deterministic.train(jobs, progress=False)
    before = deterministic.score([IDS])[0]
    trainer = deterministic.trainer()
    ids = [trainer.submit(j) for j in jobs]
    resident = {}
    while trainer.busy:
        trainer.step()
        adapters = [run.adapter for run in trainer._resident]
        resident |= {adapter.uid: adapter for adapter in adapters}
        done = [result.adapter for result in map(trainer.poll, ids) if result is not None]
        scores = deterministic.score([IDS] * (1 + len(adapters + done)), adapters=[None, *adapters, *done])
        assert torch.equal(scores[0], before)
        assert all(score.isfinite().all() for score in scores)
        assert not any(adapter.params.requires_grad for adapter in adapters)
    same_results([trainer.result(i) for i in ids], wanted)
    assert set(resident) == {trainer.result(i).adapter.uid for i in ids}, "the adapter that is trained is the result"
    assert not torch.equal(deterministic.score([IDS], adapters=trainer.result(ids[1]).adapter)[0], before)


@pytest.mark.parametrize("recompute", ["mlp", "layer"])
def test_recomputing_changes_no_bit(deterministic, recompute):
    """With dropout too, whose masks are drawn again."""
    loras = [LoraConfig(r=3, target_modules=SEVEN, lora_dropout=p) for p in (0.0, 0.3)]
    jobs = [job(i, lora=lora) for i, lora in enumerate(loras)]
    wanted = deterministic.train(jobs, progress=False, recompute="none")
    same_results(deterministic.train(jobs, progress=False, recompute=recompute), wanted)
    assert wanted[0].losses != wanted[1].losses
    data = some_data(random_adapter(deterministic), seed=1)
    forward_backward(deterministic.model, data, 10_000)
    adapter = random_adapter(deterministic)
    again = [replace(d, adapter=adapter) for d in data]
    forward_backward(deterministic.model, again, 10_000, recompute)
    assert torch.equal(adapter.grads, data[0].adapter.grads)


def test_small_passes_recompute_nothing(deterministic, monkeypatch):
    """Passes of at most kept_tokens tokens; the others recompute, and the numbers are the same."""
    modes = set()

    def spy(model, batches, recompute):
        modes.add((sum(len(ids) for part in batches for ids in part.sequences) <= 9, recompute))
        return target_logprobs(model, batches, recompute)

    target_logprobs = train.target_logprobs
    monkeypatch.setattr(train, "target_logprobs", spy)
    trainer = train.Trainer(
        deterministic.model, deterministic.inputs.train_sequences, 64, recompute="layer", kept_tokens=9
    )
    jobs = [job(i, epochs=3) for i in range(2)]
    results = finish(trainer, [trainer.submit(j) for j in jobs])
    assert modes == {(True, "none"), (False, "layer")}
    same_results(results, deterministic.train(jobs, progress=False, recompute="none"))


def test_options_that_are_refused(engine):
    for options, message in (
        (dict(token_budget=0), "token_budget: found 0"),
        (dict(token_budget=1.5), r"token_budget: found 1\.5"),
        (dict(recompute="all"), "recompute: found 'all'"),
    ):
        with pytest.raises(InputError, match=message):
            engine.trainer(**options)


# Checkpoints

RESUMED = {
    "plain": dict(num_epochs=3),
    "dropout, accumulation and shuffling": dict(
        lora=LoraConfig(r=3, lora_dropout=0.3, target_modules=SEVEN), batch_size=2, gradient_accumulation_steps=2,
        num_epochs=6, seed=11, lr_scheduler="cosine", warmup_steps=2, weight_decay=0.1,
    ),
    "in order, one accumulation": dict(gradient_accumulation_steps=3, num_epochs=5, seed=None),
}  # fmt: skip


def resumable(directory, every, fields):
    sequences = oracle.sequences([9, 4, 15, 22, 3, 8, 30], seed=1)
    defaults = {"learning_rate": 1e-2, "num_epochs": 2, "lora": LoraConfig(r=4)}
    where = dict(checkpoint_dir=None if directory is None else str(directory), checkpoint_every=every)
    return TrainJob(sequences, **{**defaults, **fields, **where})


@pytest.mark.parametrize("kind", ["engine", "deterministic"])
@pytest.mark.parametrize("label", RESUMED)
def test_an_interrupted_job_ends_as_if_it_were_not(label, kind, request, tmp_path):
    """Stopped after any number of passes, in the middle of an accumulation too, and after being stopped twice."""
    engine = request.getfixturevalue(kind)
    fields = RESUMED[label]
    wanted = engine.train([resumable(None, 1, fields)], progress=False, token_budget=40)
    for stop in (1, 6, 8):
        directory = tmp_path / str(stop)
        for _ in range(2):
            trainer = engine.trainer(token_budget=40)
            trainer.submit(resumable(directory, 2, fields))
            for _ in range(stop):
                trainer.step()
            assert trainer.busy
        is_there = (directory / "checkpoint.safetensors").exists()
        assert is_there or stop == 1
        calls = []
        trainer = engine.trainer(token_budget=40, callback=lambda *call, calls=calls: calls.append(call))
        same_results(finish(trainer, [trainer.submit(resumable(directory, 2, fields))]), wanted)
        steps = [step for _, step, _ in calls]
        assert steps == list(range(steps[0], wanted[0].num_steps + 1))
        assert (steps[0] > 1) == is_there, "it goes on from the checkpoint"
        assert [f.name for f in directory.iterdir()] == ["checkpoint.safetensors"]


def test_an_interrupted_job_goes_on_with_another_token_budget(deterministic, tmp_path):
    """As another device has. Passes are cut otherwise, so numbers agree to rounding; it was "a checkpoint of another
    job" before, so that a policy's update could never go on."""
    wanted = deterministic.train([resumable(None, 1, {"batch_size": 3})], progress=False, token_budget=40)[0]
    trainer = deterministic.trainer(token_budget=40)
    trainer.submit(resumable(tmp_path, 1, {"batch_size": 3}))
    for _ in range(6):
        trainer.step()
    trainer = deterministic.trainer(token_budget=25)
    result = finish(trainer, [trainer.submit(resumable(tmp_path, 1, {"batch_size": 3}))])[0]
    assert result.num_steps == wanted.num_steps
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(wanted.losses), rtol=1e-4, atol=1e-5)


def checkpointed(engine, directory, fields=None, passes=5):
    trainer = engine.trainer(token_budget=40)
    trainer.submit(resumable(directory, 2, fields or {}))
    for _ in range(passes):
        trainer.step()
    assert (directory / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_another_job_is_refused(engine, tmp_path):
    checkpointed(engine, tmp_path)
    content = (tmp_path / "checkpoint.safetensors").read_bytes()
    others = [
        dict(learning_rate=2e-2), dict(num_epochs=3), dict(seed=1), dict(lora=LoraConfig(r=5)), dict(betas=(0.9, 0.99)),
        dict(lora=LoraConfig(r=4, lora_alpha=9)), dict(lora=LoraConfig(r=4, lora_dropout=0.1)), dict(append_eos=True),
        dict(sequences=oracle.sequences([9], seed=1)), dict(init_from=random_adapter(engine, LoraConfig(r=4))),
    ]  # fmt: skip
    for fields in others:
        changed = TrainJob(**{**vars(resumable(tmp_path, 2, {})), **fields})
        (result,) = engine.train([changed], progress=False, token_budget=40)
        assert result.error is not None, fields
        assert result.error.startswith(f"{tmp_path / 'checkpoint.safetensors'}: a checkpoint of another job"), fields
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == content
    (result,) = engine.train([resumable(tmp_path, 2, {})], progress=False, token_budget=40)
    assert result.error is None


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(engine, tmp_path, keep):
    checkpointed(engine, tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    bad, good = engine.train([resumable(tmp_path, 2, {}), job(0)], progress=False, token_budget=40)
    assert bad.error is not None
    assert bad.error.startswith(f"{file}: not a readable checkpoint")
    assert good.error is None


def test_a_place_that_cannot_be_written_fails_its_job_alone(deterministic, tmp_path):
    (tmp_path / "file").write_text("in the way")
    bad, good = deterministic.train([resumable(tmp_path / "file", 2, {}), job(0)], progress=False)
    assert bad.error is not None
    assert bad.error.startswith(f"checkpoint_dir: {tmp_path / 'file'}: cannot be written")
    assert len(bad.losses) == 2
    same_results([good], deterministic.train([job(0)], progress=False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(checkpoint_dir=3), "checkpoint_dir: found 3"),
        (dict(checkpoint_every=0), "checkpoint_every: found 0"),
        (dict(lora=None), "lora: found None; accepted: a LoraConfig"),
        (dict(init_from="adapter"), "init_from: found str; accepted: an Adapter"),
        (dict(lora=LoraConfig(rank_pattern={"(": 2})), r"lora\.rank_pattern: found '\(', no regular expression"),
        (dict(max_grad_norm=-1.0), r"max_grad_norm: found -1\.0"),
        (dict(warmup_steps=-1), "warmup_steps: found -1"),
        (dict(batch_size=2.0), r"batch_size: found 2\.0"),
        (dict(seed=-1), "seed: found -1"),
        (dict(sequences=None), "sequences: found None"),
        (dict(sequences=[None]), r"sequences\[0\]: found NoneType"),
        (dict(sequences=["text"]), r"sequences\[0\]: .*tokenizer"),
        (dict(sequences=[[{"role": "user", "content": "hi"}]]), r"sequences\[0\]: .*tokenizer"),
    ],
)
def test_jobs_that_cannot_be_trained(deterministic, fields, message):
    """More of them are in test_train.py."""
    bad = TrainJob(**{"sequences": [IDS], **fields})
    results = deterministic.train([bad, job(0)], progress=False)
    assert results[0].adapter is None
    with pytest.raises(InputError, match=message):
        raise InputError(results[0].error)
    assert results[1].error is None


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": [0.0, 1.0]},
        {"loss": "importance_sampling", "old_logprobs": [-1e30, -1.0], "advantages": [0.0, 1.0]},
        {"loss": "importance_sampling", "old_logprobs": [-1e30, -1.0], "advantages": [2.0, 1.0], "weights": [0.0, 1.0]},
        {"loss": "importance_sampling", "old_logprobs": [-1e30, -1e30], "advantages": [0.0, 0.0]},
    ],
    ids=[
        "weight 0",
        "advantage 0 and a ratio that overflows",
        "weight 0 and a ratio that overflows",
        "nothing but zeros",
    ],
)
@pytest.mark.parametrize("first", [-1.5, -math.inf, math.nan])
def test_a_token_without_weight_has_no_part_in_loss_or_gradient(fields, first):
    """Whatever its log-probability and its ratio are: 0 times infinity would be NaN, in the loss or in the gradient."""
    logprobs = torch.tensor([first, -0.5], requires_grad=True)
    datum = Datum(None, [1, 2, 3], **fields)
    loss = datum_loss(datum, logprobs, "data[0].loss")
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad[0] == 0
    assert logprobs.grad.isfinite().all()


def test_float16_is_not_trained_in(engine, monkeypatch):
    """Without a loss scale, 1 / (targets of a step) times a gradient is below float16's smallest number. On a CPU a
    float16 base computes in float32, so it trains."""
    adapter = engine.create_adapter(LoraConfig(r=2))
    monkeypatch.setattr(engine.model, "compute_dtype", torch.float16)
    with pytest.raises(
        InputError, match="dtype: found 'float16'; accepted: bfloat16 or float32 to train on this device"
    ):
        engine.trainer()
    with pytest.raises(InputError, match="dtype: found 'float16'"):
        engine.forward_backward([Datum(adapter, [5, 6])])


def test_finished_adapters_are_within_the_bound(engine, monkeypatch):
    """They stay on the device, so they count; where they stand in the way of a job, the oldest move to host memory.

    Not counted, 750 adapters of a published round would have run out of a GPU's memory after 229.
    """
    lora, offloaded = LoraConfig(r=2), []
    size = engine.create_adapter(lora).nbytes
    monkeypatch.setattr(Adapter, "offload", lambda adapter: offloaded.append(adapter.uid) or adapter.nbytes)
    trainer = engine.trainer()
    trainer.state_bytes = 14 * size
    ids = [trainer.submit(TrainJob([[5, 6, 7]], lora, num_epochs=1 + i % 3, seed=i)) for i in range(30)]
    while trainer.busy:
        trainer.step()
        finished = [result.adapter.uid for i in ids if (result := trainer.poll(i)) is not None]
        on_device = size * len(set(finished) - set(offloaded))
        assert on_device + 4 * size * trainer.num_resident <= 14 * size
    assert len(offloaded) >= 30 - 14
    assert len(set(offloaded)) == len(offloaded)
    assert all(trainer.poll(i).error is None for i in ids)


def test_an_offloaded_adapter_comes_back(engine):
    """On a CPU there is nowhere to go; the parameters are the same before and after."""
    adapter = engine.create_adapter(LoraConfig(r=2))
    before = adapter.params.clone()
    assert adapter.offload() == 0
    assert torch.equal(adapter.params, before)


@pytest.mark.parametrize(
    ("targets", "again"), [(("q_proj", "v_proj"), 1), ("all-linear", 2)], ids=["no adapter on down", "one on down"]
)
def test_recomputing_an_mlp_repeats_no_frozen_product_for_nothing(engine, monkeypatch, targets, again):
    """Backward through a frozen product needs its weight alone: without an adapter on it, down is not made again."""
    module, calls = sys.modules["seal_kernels.linear"], []
    product = module.frozen_linear_forward
    for name in ("seal_kernels.linear", "seal_kernels.lora", "seal_kernels.lora_cpu"):
        if hasattr(sys.modules.get(name), "frozen_linear_forward"):
            monkeypatch.setattr(sys.modules[name], "frozen_linear_forward", lambda *a: calls.append(1) or product(*a))
    adapter, counts = engine.create_adapter(LoraConfig(r=2, target_modules=targets)), []
    for recompute in ("none", "mlp"):
        calls.clear()
        forward_backward(engine.model, [Datum(adapter, [5, 6, 7])], 100, recompute)
        counts.append(len(calls))
    layers = engine.config.num_hidden_layers
    assert counts == [4 * layers, (4 + again) * layers]
