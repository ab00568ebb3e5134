"""A decode step that is launched before the host reads the last one's tokens, on a CUDA device that is pretended.

Whatever ends, joins or changes meanwhile, the outputs are the CPU's, which launches nothing ahead.
"""

from dataclasses import replace

import pytest
import torch

from gpu.pretended_cuda import PretendedCuda, plant
from gpu.test_pretended_cuda import CHARACTERS, make_model
from seal_engine import Engine, LoraConfig, SamplingParams
from seal_engine.model import graphs as model_graphs
from seal_engine.model.transformer import Model
from seal_engine.sampling.sampler import Sampler
from seal_engine.sampling.scheduler import Sequence
from seal_kernels.dispatch import INTERPRET

pytestmark = [
    pytest.mark.skipif(not INTERPRET, reason="kernels run in Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.xdist_group("pretended CUDA, ahead"),  # one process has the device
]

SAMPLED = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=5)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [13], list(range(20)), [1, 2, 3]]


@pytest.fixture(scope="module")
def device():
    with PretendedCuda() as device:
        yield device


@pytest.fixture(scope="module")
def engines(device):
    return {where: Engine(make_model(1, where)) for where in ("cpu", "cuda")}


def make_sampler(engine: Engine, num_blocks: int = 40, max_num_seqs: int = 4) -> Sampler:
    """A sampler whose tokens are letters, and whose deltas carry text."""
    own = engine.sampler(num_blocks, max_num_seqs=max_num_seqs)

    def decode(ids: list[int]) -> str:
        return "".join((CHARACTERS + "!")[i] for i in ids)

    return Sampler(
        own.model, own.cache, decode, own.stop_token_ids, own.token_budget, own.seeds, max_num_seqs, stream=True,
        decode_cache=own.decode_cache,
    )  # fmt: skip


def sampled(engine, params, after_step=lambda step, sampler: None, **sizes):
    """(outputs, all deltas' text by completion, the sampler) of PROMPTS, one SamplingParams each."""
    sampler = make_sampler(engine, **sizes)
    ids = [sampler.add_request(None, prompt, own) for prompt, own in zip(PROMPTS, params, strict=False)]
    texts: dict[tuple[int, int], str] = {}
    step = 0
    while sampler.busy:
        for delta in sampler.step():
            key = delta.request_id, delta.index
            texts[key] = texts.get(key, "") + delta.text
        sampler.check_integrity()
        after_step(step, sampler)
        step += 1
    outputs = [
        (c.token_ids, c.text, c.finish_reason, c.logprobs and torch.tensor(c.logprobs).round(decimals=3).tolist())
        for i in ids
        for c in sampler.output(i).outputs
    ]
    errors = [sampler.output(i).error for i in ids]
    return (outputs, errors, texts), sampler


def ends(texts):
    return replace(SAMPLED, stop=texts)


CASES = {
    "lengths": [replace(SAMPLED, max_tokens=n) for n in (1, 7, 2, 8, 5)],
    "stop texts and ids": [
        ends(["a"]), ends(["b", "cd"]), replace(SAMPLED, stop_token_ids=list(range(0, 40, 5))), ends(["e"]), SAMPLED,
    ],
    "several samples": [replace(SAMPLED, n=3, max_tokens=6), replace(SAMPLED, n=2, stop=list("abcdefgh"))],
    "filters and log-probabilities": [
        replace(SAMPLED, top_p=0.8, logprobs=2), replace(SAMPLED, top_k=5, logprobs=0), replace(SAMPLED, min_p=0.1),
        replace(SAMPLED, temperature=0.0), replace(SAMPLED, prompt_logprobs=True),
    ],
    "what needs the last token": [
        replace(SAMPLED, presence_penalty=2.0), replace(SAMPLED, repetition_penalty=1.5, max_tokens=4),
        replace(SAMPLED, min_tokens=5, stop_token_ids=list(range(20))), SAMPLED,
        replace(SAMPLED, max_tokens=6, logits_hook=lambda ids, logits: logits.roll(len(ids) and ids[-1])),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        *((case, {}) for case in CASES),
        pytest.param("stop texts and ids", {"max_num_seqs": 2}, id="some wait"),
        pytest.param("lengths", {"num_blocks": 4}, id="some are preempted"),
        pytest.param("several samples", {"num_blocks": 4}, id="some of several are preempted"),
    ],
)
def test_outputs_are_those_of_steps_one_after_another(engines, case, sizes):
    on_cpu, _ = sampled(engines["cpu"], CASES[case], **sizes)
    on_gpu, _ = sampled(engines["cuda"], CASES[case], **sizes)
    assert on_gpu == on_cpu


def test_a_request_is_cancelled_and_another_joins(engines):
    def change(step, sampler):
        if step == 3:
            sampler.cancel(1)
        if step == 4:
            sampler.add_request(None, [9, 9, 9], replace(SAMPLED, max_tokens=3))

    outcomes = []
    for engine in engines.values():
        on_device, sampler = sampled(engine, [SAMPLED] * 3, change)
        outcomes.append((on_device, sampler.output(3).outputs[0].token_ids))
    assert outcomes[0] == outcomes[1]
    assert outcomes[1][0][0][1][2] == "cancelled"


def test_weights_that_change_between_steps_are_used_at_once(engines):
    """What was launched ahead with the old ones is dropped."""
    outcomes = []
    for where in engines:
        engine = Engine(make_model(1, where))
        adapter = engine.create_adapter(LoraConfig(r=2), seed=0)
        adapter.params.copy_(torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(0)))

        def merge(step, sampler, engine=engine, adapter=adapter):
            if step == 4:
                engine.merge(adapter)

        outcomes.append(sampled(engine, [SAMPLED] * 2, merge)[0])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != sampled(engines["cpu"], [SAMPLED] * 2)[0]


def test_an_interrupted_step_leaves_nothing_ahead(engines, monkeypatch):
    def interrupt(step, sampler):
        if step in (2, 4):
            with monkeypatch.context() as patch:
                patch.setattr(sampler, "_append_token", lambda *args: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    sampler.step()
            assert sampler._ahead is None

    assert sampled(engines["cuda"], [SAMPLED] * 3, interrupt)[0] == sampled(engines["cpu"], [SAMPLED] * 3)[0]


def test_a_token_that_cannot_be_drawn_fails_its_request_alone(engines, monkeypatch):
    """It is -1, and would be looked up among the embeddings by the step ahead."""
    logits, poisoned, outcomes = Model.logits, [], []

    def poisoned_logits(model, hidden):
        out = logits(model, hidden)
        if poisoned and len(out) == 2:
            out[1] = float("nan")
        return out

    monkeypatch.setattr(Model, "logits", poisoned_logits)
    for engine in engines.values():
        poisoned.clear()
        (outputs, errors, _), _ = sampled(engine, [SAMPLED] * 2, lambda step, sampler: poisoned.append(step))
        outcomes.append(outputs[0])
        assert errors[0] is None
        assert "not finite" in errors[1]
    assert outcomes[0] == outcomes[1]


def test_the_next_step_is_launched_before_the_host_waits(engines, device):
    """All but the last step, which has no next one; and a step does not wait twice."""
    sampler = make_sampler(engines["cuda"])
    for prompt in PROMPTS[:3]:
        sampler.add_request(None, prompt, SAMPLED)
    computed = []
    while sampler.busy:
        before = device.syncs.total()
        sampler.step()
        computed.append(sampler.tokens_computed)
        assert device.syncs.total() - before == 1
    prompts = sum(map(len, PROMPTS[:3]))
    assert computed == [prompts + 3 * min(step, 7) for step in range(1, 9)]


def test_tokens_that_are_not_put_into_the_graph_are_caught(engines, monkeypatch):
    plant(monkeypatch, model_graphs.Graphs, "run", "if token_ids is not None:", "if False:")
    on_gpu, _ = sampled(engines["cuda"], [SAMPLED] * 3)
    assert on_gpu != sampled(engines["cpu"], [SAMPLED] * 3)[0]


def test_a_last_token_that_is_not_waited_for_is_caught(engines, monkeypatch):
    monkeypatch.setattr(Sequence, "needs_last_token", False)
    params = CASES["what needs the last token"]
    on_gpu, _ = sampled(engines["cuda"], params)
    assert on_gpu != sampled(engines["cpu"], params)[0]
