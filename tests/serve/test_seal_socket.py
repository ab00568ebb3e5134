"""Drivers that speak SEAL's protocol get the numbers that the same jobs give through Python."""

import json
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep

import pytest
import zmq
from seal_cases import Driver, published_requests
from serving import idle, running

from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob, TrainSequence
from seal_engine.domains.knowledge.grading import contains
from seal_engine.tiny import MODEL

PROMPT = "Let's answer a question directly and concisely.\nQuestion: {}\nAnswer:\n"
SMALL = {
    "train_sequences": ["Ann Lee collects coins.", "Ann Lee lives in Oslo."],
    "eval_questions": [{"title": "Ann", "context": "", "question": "Topic: Ann\nWhere?", "answer": "Oslo"}],
    "finetune_epochs": 2,
}


@pytest.fixture(scope="module")
def exact():
    """Deterministic: with other drivers' jobs in its passes, an adapter keeps its bits."""
    return Engine.from_pretrained(MODEL, device="cpu", deterministic=True)


@pytest.fixture(scope="module")
def seal(exact):
    with running(exact, "--seal-port", "0", "--seed", "3") as server:
        yield server


@pytest.fixture
def driver(seal):
    made = Driver(seal.seal.port, 60)
    yield made
    made.close()


def through_python(engine, request, seed):
    """The reply to a request, computed from Engine.train and Engine.generate alone."""
    job = TrainJob(
        request["train_sequences"],
        LoraConfig(r=request["lora_rank"], lora_alpha=request["lora_alpha"]),
        learning_rate=request["finetune_lr"],
        num_epochs=request["finetune_epochs"],
        seed=seed,
    )
    adapter = engine.train([job], progress=False)[0].adapter
    assert adapter is not None
    prompts = [PROMPT.format(question["question"]) for question in request["eval_questions"]]
    params = SamplingParams(temperature=0, max_tokens=64)
    texts, correct = {}, {}
    for name, owner in (("baseline", None), ("adapter", adapter)):
        outs = engine.generate(prompts, params, adapters=owner, progress=False)
        texts[name] = [out.outputs[0].text for out in outs]
        answers = [question["answer"] for question in request["eval_questions"]]
        correct[name] = [contains(text, gold) == 1 for text, gold in zip(texts[name], answers, strict=True)]
    accuracy = {name: sum(values) / len(values) for name, values in correct.items()}
    return {
        "baseline_accuracy": round(accuracy["baseline"], 4),
        "adapter_accuracy": round(accuracy["adapter"], 4),
        "adapter_gain": round(accuracy["adapter"] - accuracy["baseline"], 4),
        "baseline_texts": texts["baseline"],
        "adapter_texts": texts["adapter"],
        "baseline_correct": correct["baseline"],
        "adapter_correct": correct["adapter"],
        "gains": [a - b for a, b in zip(correct["adapter"], correct["baseline"], strict=True)],
        "seed": seed,
    }


def test_eight_drivers_at_once(seal, exact):
    """Published self-edits, cut short; jobs of different drivers share passes, and every number is as through Python.
    benchmarks/bench_serve.py does it with 40, and takes the time."""
    requests = published_requests(8, sequences=2, finetune_epochs=4)
    passes = seal.service.worker.turns["training"]
    drivers = [Driver(seal.seal.port, 60) for _ in requests]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(Driver.ask, drivers, requests))
    for made in drivers:
        made.close()
    assert replies[:3] == [through_python(exact, request, 3) for request in requests[:3]]
    assert all("error" not in reply for reply in replies)
    assert seal.service.worker.turns["training"] - passes < 8 * 8 * 0.8  # 8 steps a job, were they trained one by one
    assert idle(seal)


def test_the_base_alone(driver):
    """Without sequences, and with skip_training, adapter fields equal the baseline's."""
    for change in ({"train_sequences": []}, {"skip_training": True}, {"train_sequences": None}):
        reply = driver.ask({**SMALL, **change})
        assert reply["adapter_texts"] == reply["baseline_texts"]
        assert reply["adapter_correct"] == reply["baseline_correct"]
        assert (reply["adapter_gain"], reply["gains"]) == (0, [0])
        assert "seed" not in reply


def test_the_base_is_asked_once(seal, driver):
    """Its answers are kept: the same questions with another self-edit sample only the adapter's answers."""
    questions = [{"question": "Topic: Bob\nWho?", "answer": "Bob"}]
    sampler = seal.service.worker.sampler
    driver.ask({**SMALL, "eval_questions": questions, "skip_training": True})
    before = sampler.tokens_done
    first = driver.ask({**SMALL, "eval_questions": questions, "skip_training": True})
    assert sampler.tokens_done == before
    again = driver.ask({**SMALL, "eval_questions": questions})
    assert again["baseline_texts"] == first["baseline_texts"]


def test_a_baseline_that_is_not_wanted(driver):
    reply = driver.ask({**SMALL, "eval_questions": [{"question": "Who?", "answer": "x"}], "baseline_eval": False})
    assert (reply["baseline_accuracy"], reply["baseline_texts"]) == (0, [""])
    assert reply["adapter_texts"] != [""]


def test_the_loss_begins_behind_the_substring(seal, driver, exact):
    """Tokens up to the end of its first occurrence, as token ids, carry none; a text without it is trained whole."""
    texts = ["The town of Ann is Oslo is Rome", "Ann collects coins"]
    fields = dict(finetune_epochs=3, lora_rank=4, lora_alpha=8, finetune_lr=1e-2)
    question = [{"question": "What does Ann collect?", "answer": "coins"}]
    reply = driver.ask(
        {"train_sequences": texts, "eval_questions": question, "end_mask_substring": " is", **fields}
    )  # fmt: skip
    ids = exact.tokenizer.encode(texts[0])
    masked = ids.index(exact.tokenizer.encode(" is", add_special_tokens=False)[0]) + 1
    sequences = [TrainSequence(ids, [0] * masked + [1] * (len(ids) - masked)), texts[1]]
    job = TrainJob(sequences, LoraConfig(r=4, lora_alpha=8), learning_rate=1e-2, num_epochs=3, seed=3)
    adapter = exact.train([job], progress=False)[0].adapter
    params = SamplingParams(temperature=0, max_tokens=64)
    (out,) = exact.generate([PROMPT.format(question[0]["question"])], params, adapter, progress=False)
    assert reply["adapter_texts"] == [out.outputs[0].text]


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "request"),
        (b"5", "request"),
        (json.dumps({}).encode(), "eval_questions"),
        (json.dumps({**SMALL, "eval_questions": []}).encode(), "eval_questions"),
        (json.dumps({**SMALL, "eval_questions": [{}]}).encode(), "eval_questions[0].question"),
        (json.dumps({**SMALL, "eval_questions": "who?"}).encode(), "eval_questions"),
        (json.dumps({**SMALL, "train_sequences": "text"}).encode(), "train_sequences"),
        (json.dumps({**SMALL, "train_sequences": [5]}).encode(), "train_sequences"),
        (json.dumps({**SMALL, "train_sequences": [""]}).encode(), "sequences"),
        (json.dumps({**SMALL, "lora_rank": 0}).encode(), "lora_rank"),
        (json.dumps({**SMALL, "lora_rank": 10**9}).encode(), "lora_rank"),
        (json.dumps({**SMALL, "lora_rank": "32"}).encode(), "lora_rank"),
        (json.dumps({**SMALL, "finetune_epochs": 10**9}).encode(), "finetune_epochs"),
        (json.dumps({**SMALL, "finetune_lr": -1}).encode(), "finetune_lr"),
        (json.dumps({**SMALL, "end_mask_substring": 5}).encode(), "end_mask_substring"),
        (json.dumps({**SMALL, "chain_of_thought": True}).encode(), "chain_of_thought"),
        (json.dumps({**SMALL, "olora": {"lambda": 1}}).encode(), "olora"),
        (json.dumps({**SMALL, "finetune_lr": 1e38}).encode(), "training failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_gets_an_error(driver, payload, named):
    """One line that names the key; the next request on the socket is answered."""
    driver.connect()
    driver.socket.send(payload)
    assert driver.socket.poll(60_000)
    reply = driver.socket.recv_json()
    assert list(reply) == ["error"]
    assert named in reply["error"]
    assert driver.ask({"cmd": "shutdown"}) == {"status": "bye"}


def test_unknown_keys_are_tolerated_and_seeds_may_come_with_a_request(driver):
    same = driver.ask({**SMALL, "reward_mode": "x", "a_key_of_tomorrow": 1, "chain_of_thought": False})
    assert "error" not in same
    assert driver.ask({**SMALL, "seed": 3})["adapter_texts"] == same["adapter_texts"]
    assert driver.ask({**SMALL, "seed": 4})["seed"] == 4


def test_a_request_that_is_sent_again_joins_the_first(seal):
    """As a driver's retry on a new socket after its time-out: nothing is trained twice, the retry has the reply."""
    request = {**SMALL, "finetune_epochs": 100, "eval_questions": [{"question": "Retry?", "answer": "x"}]}
    before = seal.service.worker.trainer.tokens_done if seal.service.worker.trainer else 0
    impatient = Driver(seal.seal.port)
    impatient.send(request)
    sleep(0.1)
    impatient.close()
    patient = Driver(seal.seal.port, 60)
    reply = patient.ask(request)
    assert "error" not in reply
    ids = [seal.service.engine.tokenizer.encode(text) for text in request["train_sequences"]]
    assert seal.service.worker.trainer.tokens_done - before == 100 * sum(map(len, ids))
    patient.close()


def test_a_client_that_vanishes_costs_nothing(seal, driver):
    """Its work ends, its reply goes nowhere, and others are answered."""
    for _ in range(5):
        gone = Driver(seal.seal.port)
        gone.send({**SMALL, "seed": 77})
        gone.close()
    assert "error" not in driver.ask(SMALL)
    deadline = monotonic() + 30
    while not idle(seal) and monotonic() < deadline:
        sleep(0.05)
    assert idle(seal)
    assert seal.seal.running() == []


def test_a_dealer_without_the_empty_frame(seal):
    """Any envelope comes back as it was."""
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://127.0.0.1:{seal.seal.port}")
        socket.send_multipart([b"a", b"b", json.dumps({"cmd": "shutdown"}).encode()])
        assert socket.poll(30_000)
        assert socket.recv_multipart() == [b"a", b"b", b'{"status": "bye"}']


def test_kept_adapters(engine, tmp_path, monkeypatch):
    """The n-th trained request's, from 0; requests that train nothing do not count."""
    monkeypatch.chdir(tmp_path)
    with running(engine, "--seal-port", "0", "--keep-adapter-dir") as server:
        driver = Driver(server.seal.port, 60)
        driver.ask({**SMALL, "skip_training": True})
        replies = [driver.ask({**SMALL, "lora_rank": rank}) for rank in (3, 5)]
        assert replies[0]["seed"] != replies[1]["seed"]  # without --seed another one each time
        for number, rank in enumerate((3, 5)):
            directory = f"models/tmp_{server.seal.port}_inner_TTT_{number}/final_adapter"
            assert engine.load_adapter(directory).config.r == rank
        driver.close()


def test_graders(engine):
    """exact and the model itself; an endpoint, which is this server, asked by the model's name."""
    question = {"question": "Who?", "answer": "nobody at all"}
    for flags in (["exact"], ["model"]):
        with running(engine, "--seal-port", "0", "--grader", *flags) as server:
            driver = Driver(server.seal.port, 60)
            reply = driver.ask({**SMALL, "eval_questions": [question], "skip_training": True})
            assert reply["baseline_correct"] == [False]
            assert reply.get("ungraded", 0) == (2 if flags == ["model"] else 0)  # the miniature says neither yes nor no
            driver.close()


def test_grading_by_an_endpoint_which_is_ours(engine):
    """A second server's grader asks the first one's chat completions: no network beyond loopback."""
    with running(engine) as grading:
        flags = ["--grader", "endpoint", "--endpoint", f"{grading.url}/v1", "--endpoint-model", str(MODEL)]
        with running(engine, "--seal-port", "0", *flags) as server:
            driver = Driver(server.seal.port, 60)
            reply = driver.ask({**SMALL, "skip_training": True})
            assert reply["ungraded"] == 2
            assert grading.service.worker.sampler.tokens_done > 0
            driver.close()


def test_with_a_key_drivers_bring_it(engine):
    with running(engine, "--seal-port", "0", key="a-long-enough-key") as server:
        driver = Driver(server.seal.port, 60)
        for sent in ({}, {"api_key": "wrong"}, {"api_key": 5}):
            assert driver.ask({**SMALL, **sent}) == {"error": "api_key: a key is required"}
            assert "error" in driver.ask({"cmd": "shutdown", **sent})
        assert "error" not in driver.ask({**SMALL, "skip_training": True, "api_key": "a-long-enough-key"})
        driver.close()


def test_the_example(engine, capsys):
    with running(engine, "--seal-port", "0", "--seed", "0") as server:
        example = runpy.run_path(str(Path(__file__).parents[2] / "examples/seal_driver.py"))
        example["PASSAGES"].pop("Ann Lee")
        replies = example["main"](server.seal.port, 4)
    assert sum(reply["adapter_accuracy"] for reply in replies) > sum(reply["baseline_accuracy"] for reply in replies)
    assert len(capsys.readouterr().out.splitlines()) == len(replies) + 1
