"""The Tinker SDK, unchanged, against this server: every result is what the same calls give through Python."""

import asyncio

import numpy as np
import pytest
import torch

pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

import tinker
from peft import PeftModel
from tinker_cases import (
    BASE,
    SDK_CONNECTIONS,
    CuttingProxy,
    ids_of,
    logprobs,
    prompt,
    sampling,
    shifted,
    tinker_server,
)
from transformers import AutoModelForCausalLM

from seal_engine import AdamParams, Datum, Engine, LoraConfig, SamplingParams
from seal_engine.tiny import MODEL
from tinker_client import service_client

pytestmark = SDK_CONNECTIONS
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEP = tinker.AdamParams(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=1.0)
SAME_STEP = AdamParams(1e-2, (0.9, 0.95), 1e-12, 0.01, 1.0)


@pytest.fixture(scope="module")
def engine():
    """In float32: in the checkpoint's bfloat16 a pass with gradients rounds elsewhere than one without."""
    return Engine.from_pretrained(MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with tinker_server(engine, tmp_path_factory.mktemp("tinker")) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    with service_client(server.url) as running_client:
        yield running_client


def policy_datum(ids, seed, masked=0):
    """Inputs of a policy loss; the first `masked` targets are 0 without an advantage, as recipes write prompts."""
    generator = torch.Generator().manual_seed(seed)
    old = (-3 + torch.rand(len(ids) - 1, generator=generator)).tolist()
    advantages = torch.randn(len(ids) - 1, generator=generator).tolist()
    targets = [0] * masked + ids[1 + masked :]
    inputs = {"logprobs": old, "advantages": [0.0] * masked + advantages[masked:], "target_tokens": targets}
    return shifted(ids, **inputs), dict(old_logprobs=old, advantages=inputs["advantages"], target_tokens=targets)


LOSSES = {
    "importance_sampling": (None, None),
    "ppo": ({"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, {"clip_low": 0.9, "clip_high": 1.1}),
    "ppo by default": (None, None),
    "cispo": ({"clip_high_threshold": 2.0}, {"clip_high": 2.0}),
    "dro": ({"beta": 0.2}, {"beta": 0.2}),
}


@pytest.mark.parametrize("label", LOSSES)
def test_policy_losses_equal_python(label, client, engine):
    """Loss and log-probabilities of two steps: the seed draws the same adapter, and the sums are over tokens."""
    loss, (config, same_config) = label.split()[0], LOSSES[label]
    pairs = [policy_datum(ids, i, masked=3) for i, ids in enumerate(ids_of(3, 12, seed=1))]
    model = client.create_lora_training_client(BASE, rank=4, seed=5).result()
    adapter = engine.create_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=ALL), seed=5)
    data = []
    for datum, fields in pairs:
        ids = datum.model_input.to_ints()
        data.append(Datum(adapter, [*ids, 0], loss, [1.0] * len(ids), loss_config=same_config, **fields))
    for _ in range(2):
        future, step = model.forward_backward([d for d, _ in pairs], loss, config), model.optim_step(STEP)
        ours = engine.forward_backward(data)
        norm = engine.optim_step([(adapter, SAME_STEP)])[0]
        assert future.result().metrics["loss:sum"] == pytest.approx(sum(r.loss for r in ours), rel=1e-6)
        for theirs, result in zip(logprobs(future.result()), ours, strict=True):
            np.testing.assert_allclose(theirs, result.logprobs.numpy(), rtol=1e-6, atol=1e-6)
        assert step.result().metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def soft_datum(ids, k, seed, sparse):
    """K targets for each token, some of weight 0, dense or as the rows of a CSR tensor."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, 900, (len(ids), k), generator=generator)
    weights = torch.rand(len(ids), k, generator=generator)
    weights[:, -1] = 0
    as_tensor = tinker.TensorData.from_torch_sparse if sparse else tinker.TensorData.from_torch
    inputs = {"target_tokens": as_tensor(targets * (weights > 0)), "weights": as_tensor(weights)}
    return tinker.Datum(model_input=prompt(ids), loss_fn_inputs=inputs), targets * (weights > 0), weights


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_soft_targets_equal_python(sparse, client, engine):
    """(N, K) targets of two widths in one request: the log-probabilities of all K come back, by datum."""
    sequences = ids_of(3, 8, seed=2)
    cases = [soft_datum(ids, k, i, sparse) for i, (ids, k) in enumerate(zip(sequences, (3, 3, 2), strict=True))]
    model = client.create_lora_training_client(BASE, rank=2, seed=6).result()
    adapter = engine.create_adapter(LoraConfig(r=2, lora_alpha=32, target_modules=ALL), seed=6)
    data = [Datum(adapter, [*ids, 0], weights=w, target_ids=t) for ids, (_, t, w) in zip(sequences, cases, strict=True)]
    output = model.forward_backward([datum for datum, _, _ in cases], "cross_entropy").result()
    ours = engine.forward_backward(data)
    assert output.metrics["loss:sum"] == pytest.approx(sum(r.loss for r in ours), rel=1e-6)
    for theirs, result in zip(logprobs(output), ours, strict=True):
        np.testing.assert_allclose(np.array(theirs), result.logprobs.numpy(), rtol=1e-6, atol=1e-6)


def test_a_custom_loss_has_the_gradient_of_the_same_function(client, engine):
    """The client differentiates and sends weights, negative ones among them; here a callable does both at once."""
    sequences = ids_of(2, 9, seed=3)

    def custom(data, logprobs_list):
        loss = sum((lp * lp.detach().exp()).sum() - 0.1 * lp.square().sum() for lp in logprobs_list)
        return loss, {"mine": 7.0}

    model = client.create_lora_training_client(BASE, rank=4, seed=7).result()
    adapter = engine.create_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=ALL), seed=7)
    future, step = model.forward_backward_custom([shifted(ids) for ids in sequences], custom), model.optim_step(STEP)
    data = [Datum(adapter, ids, lambda lp: custom(None, [lp])[0]) for ids in sequences]
    loss = sum(result.loss for result in engine.forward_backward(data))
    norm = engine.optim_step([(adapter, SAME_STEP)])[0]
    assert future.result().metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    assert future.result().metrics["mine"] == 7.0
    assert step.result().metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_forward_leaves_the_gradient_alone(client):
    """The step after two forward passes and one forward_backward has the norm of the latter alone."""
    data = [shifted(ids) for ids in ids_of(2, 9, seed=4)]
    norms = []
    for extra in (0, 2):
        model = client.create_lora_training_client(BASE, rank=4, seed=8).result()
        futures = [model.forward(data, "cross_entropy") for _ in range(extra)]
        futures.append(model.forward_backward(data, "cross_entropy"))
        norms.append(model.optim_step(STEP).result().metrics["grad_norm"])
        losses = [future.result().metrics["loss:sum"] for future in futures]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert norms[0] == norms[1]


def train(model, steps, seed=9):
    """Losses of steps."""
    data = [shifted(ids) for ids in ids_of(2, 9, seed)]
    futures = [(model.forward_backward(data, "cross_entropy"), model.optim_step(STEP)) for _ in range(steps)]
    return [(f.result().metrics["loss:sum"], s.result().metrics["grad_norm"]) for f, s in futures]


def test_a_checkpoint_goes_on_bit_for_bit(client):
    """Steps after save_state have the same numbers in the model that went on, one made from the checkpoint, and one
    that loads it over other weights; without the optimizer the second step differs."""
    model = client.create_lora_training_client(BASE, rank=4, seed=10).result()
    train(model, 3)
    path = model.save_state("three").result().path
    expected = train(model, 3)
    assert train(client.create_training_client_from_state_with_optimizer(path).result(), 3) == expected
    other = client.create_lora_training_client(BASE, rank=4, seed=11).result()
    train(other, 1)
    with pytest.warns(FutureWarning, match="load_state"):
        other.load_state_with_optimizer(path).result()
    assert train(other, 3) == expected
    bare = train(client.create_training_client_from_state(path).result(), 3)
    assert bare[0] == expected[0]
    assert bare[2] != expected[2]


def test_samples_equal_python_and_stay_of_their_version(client, engine):
    """A sampler keeps the version that it was made of, whatever is trained later; one seed, one text."""
    model = client.create_lora_training_client(BASE, rank=4, seed=12).result()
    adapter = engine.create_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=ALL), seed=12)
    sequences = ids_of(2, 9, seed=9)

    def advance():
        ((loss, _),) = train(model, 1)
        data = [Datum(adapter, ids, weights=[1.0] * (len(ids) - 1)) for ids in sequences]
        assert loss == pytest.approx(sum(result.loss for result in engine.forward_backward(data)), rel=1e-6)
        engine.optim_step([(adapter, SAME_STEP)])

    advance()
    first, first_ours = model.save_weights_and_get_sampling_client().result(), adapter.copy()
    advance()
    second = model.save_weights_and_get_sampling_client().result()
    path = model.save_weights_for_sampler("two").result().path
    loaded = client.create_sampling_client(model_path=path).result()
    base = client.create_sampling_client(base_model=BASE).result()
    assert loaded.get_base_model() == BASE
    ids = sequences[0][:5]
    for sampler, ours in ((first, first_ours), (second, adapter), (loaded, adapter), (base, None)):
        for fields in (dict(temperature=0.0), dict(seed=3, temperature=0.8, top_p=0.9)):
            theirs = sampler.sample(prompt(ids), 3, sampling(8, **fields)).result()
            params = SamplingParams(n=3, max_tokens=8, logprobs=0, **fields)
            expected = engine.generate([ids], params, adapters=ours, progress=False)[0].outputs
            assert [s.tokens for s in theirs.sequences] == [o.token_ids for o in expected]
            assert [s.stop_reason for s in theirs.sequences] == [o.finish_reason for o in expected]
            for sequence, output in zip(theirs.sequences, expected, strict=True):
                np.testing.assert_allclose(sequence.logprobs, output.logprobs, rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_a_prompt(client, engine):
    """compute_logprobs is `Engine.score`; tables hold the most likely tokens, and the last n are those of all."""
    sampler = client.create_sampling_client(base_model=BASE).result()
    ids = ids_of(1, 9, seed=13)[0]
    scores = sampler.compute_logprobs(prompt(ids)).result()
    assert scores[0] is None
    np.testing.assert_allclose(scores[1:], engine.score([ids])[0].numpy(), rtol=1e-5, atol=1e-5)
    result = sampler.sample(
        prompt(ids), 1, sampling(2, temperature=0.0), include_prompt_logprobs=True, topk_prompt_logprobs=3,
        topk_sample_logprobs=2, prompt_logprobs_last_n=4,
    ).result()  # fmt: skip
    assert result.prompt_logprobs[:-4] == [None] * (len(ids) - 4)
    assert result.prompt_logprobs[-4:] == pytest.approx(scores[-4:], rel=1e-5)
    assert result.topk_prompt_logprobs[:-4] == [None] * (len(ids) - 4)
    best = engine.logits([ids])[0].log_softmax(-1).topk(3)
    for row, place in zip(result.topk_prompt_logprobs[-4:], range(len(ids) - 5, len(ids) - 1), strict=True):
        assert [token for token, _ in row] == best.indices[place].tolist()
        assert [value for _, value in row] == pytest.approx(best.values[place].tolist(), rel=1e-4)
    sequence = result.sequences[0]
    assert [row[0][0] for row in sequence.topk_logprobs] == sequence.tokens  # greedy: the most likely one


@pytest.mark.parametrize("stop", ["text", "id"])
def test_stops(stop, client, engine):
    """A completion ends with the first token that is a stop, or completes a stop text, and has it as its last."""
    sampler = client.create_sampling_client(base_model=BASE).result()
    ids = engine.tokenizer.encode("What does Ann Lee")
    params = dict(seed=2, temperature=2.0)
    free = sampler.sample(prompt(ids), 1, sampling(8, **params)).result().sequences[0].tokens
    last = free[2]
    given = [engine.tokenizer.decode([last])] if stop == "text" else [last]
    cut = sampler.sample(prompt(ids), 1, sampling(8, stop=given, **params)).result().sequences[0]
    assert cut.tokens == free[: free.index(last) + 1]
    assert cut.stop_reason == "stop"


def test_a_saved_adapter_loads_in_peft_and_in_the_engine(client, engine, server):
    """The directory behind a tinker:// path is an adapter in PEFT's format, alpha and all, and says what the server
    says of the same tokens."""
    model = client.create_lora_training_client(BASE, rank=4, seed=14, train_attn=False).result()
    train(model, 2)
    path = model.save_weights_for_sampler("export").result().path
    directory = server.service.tinker.settings.directory / path.removeprefix("tinker://")
    ids = ids_of(1, 9, seed=15)[0]
    scores = client.create_sampling_client(model_path=path).result().compute_logprobs(prompt(ids)).result()[1:]
    ours = engine.score([ids], adapters=engine.load_adapter(directory))[0]
    np.testing.assert_allclose(scores, ours.numpy(), rtol=1e-5, atol=1e-5)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), directory)
    assert peft.peft_config["default"].lora_alpha == 32
    assert set(peft.peft_config["default"].target_modules) == {"gate_proj", "up_proj", "down_proj"}
    with torch.no_grad():
        truth = peft(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(scores, truth.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], rtol=1e-3, atol=1e-4)


def test_restful_parts(client, server):
    """Runs, checkpoints and samplers are listed, described and deleted."""
    rest = tinker.RestClient(base_url=server.url, api_key="tml-test")
    model = client.create_lora_training_client(BASE, rank=3, seed=16, user_metadata={"who": "me"}).result()
    info = model.get_info()
    assert (info.lora_rank, info.model_data.model_name, info.is_lora) == (3, BASE, True)
    state = model.save_state("a", user_metadata={"step": "1"}).result().path
    sampler = model.save_weights_for_sampler("b", ttl_seconds=3600).result().path
    checkpoints = rest.list_checkpoints(model.model_id).result().checkpoints
    assert {c.tinker_path for c in checkpoints} == {state, sampler}
    assert {c.checkpoint_type: c.user_metadata for c in checkpoints}["training"] == {"step": "1"}
    assert {c.checkpoint_type: c.expires_at is None for c in checkpoints} == {"training": True, "sampler": False}
    run = rest.get_training_run(model.model_id).result()
    assert (run.lora_rank, run.user_metadata) == (3, {"who": "me"})
    assert run.last_checkpoint.tinker_path == state
    assert rest.get_weights_info_by_tinker_path(state).result().lora_rank == 3
    assert rest.get_server_capabilities().result().supported_models[0].model_name == BASE
    session = rest.get_session(model.model_id.partition(":")[0]).result()
    assert model.model_id in session.training_run_ids
    rest.delete_checkpoint_from_tinker_path(state).result()
    assert [c.tinker_path for c in rest.list_checkpoints(model.model_id).result().checkpoints] == [sampler]
    with pytest.raises(tinker.NotFoundError, match="does not exist"):
        rest.get_weights_info_by_tinker_path(state).result()
    with pytest.raises(tinker.RequestFailedError, match=r"b exists; accepted: a new name"):
        model.save_weights_for_sampler("b").result()
    with pytest.raises(tinker.NotFoundError, match=r"/api/v1/training_runs/.*/publish: not supported here"):
        rest.publish_checkpoint_from_tinker_path(sampler).result()


@pytest.mark.parametrize(
    ("loss", "message"),
    [("stable_reinforce", "importance_sampling works"), ("gspo", "loss_fn=ppo works"), ("mse", "accepted: one of")],
)
def test_refused_losses_say_what_works(loss, message, client):
    """Named, with advice. The step behind it is refused, for it would be on gradients that are not whole; what comes
    then runs as if nothing had been."""
    model = client.create_lora_training_client(BASE, rank=2, seed=17).result()
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        model.forward_backward([policy_datum(ids_of(1, 6, seed=1)[0], 1)[0]], loss).result()
    assert caught.value.category == tinker.types.RequestErrorCategory.User
    model.forward_backward([shifted([5, 6, 7])], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match=r"gradients are dropped.*loss_fn: found"):
        model.optim_step(STEP).result()
    assert train(model, 2) == train(client.create_lora_training_client(BASE, rank=2, seed=17).result(), 2)


def test_cut_connections_change_no_number(client, server):
    """Every fifth response, of submissions and of results, is lost with its connection: the SDK sends the request
    again, and each has run once."""
    expected = train(client.create_lora_training_client(BASE, rank=4, seed=19).result(), 4)
    proxy = CuttingProxy(server.url, range(10, 35, 5))
    with service_client(proxy.url) as cut_client:
        model = cut_client.create_lora_training_client(BASE, rank=4, seed=19).result()
        assert train(model, 4) == expected
    assert proxy.count > max(proxy.cut), "all of them were lost"
    proxy.close()


def test_async_calls(client):
    """Futures can be awaited, with the results of those that are not."""

    async def run():
        model = await client.create_lora_training_client(BASE, rank=2, seed=18)
        output = await model.forward_backward([shifted([5, 6, 7])], "cross_entropy")
        sampler = await model.save_weights_and_get_sampling_client()
        sample = await sampler.sample(prompt([5, 6]), 1, sampling(3, seed=1))
        return output.metrics["loss:sum"], sample.sequences[0].tokens

    model = client.create_lora_training_client(BASE, rank=2, seed=18).result()
    loss = model.forward_backward([shifted([5, 6, 7])], "cross_entropy").result().metrics["loss:sum"]
    sampler = model.save_weights_and_get_sampling_client().result()
    tokens = sampler.sample(prompt([5, 6]), 1, sampling(3, seed=1)).result().sequences[0].tokens
    assert asyncio.run(run()) == (loss, tokens)
