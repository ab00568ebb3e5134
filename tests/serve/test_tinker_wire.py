"""What the Tinker API does with requests as they come over the wire: in any order, twice, cut off, wrong."""

import gc
import json
import random
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import httpx
import pytest

pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

from tinker.proto import tinker_public_pb2 as sdk
from tinker_cases import BASE, SDK_CONNECTIONS, becomes_idle, ids_of, tinker_server

from seal_engine.model.devices import return_freed_memory
from seal_engine.serve.tinker import messages, models, promises

pytestmark = SDK_CONNECTIONS
PROTOBUF = {"Content-Type": "application/x-protobuf"}


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with tinker_server(engine, tmp_path_factory.mktemp("tinker")) as running_server:
        yield running_server


class Wire:
    """HTTP without the SDK."""

    def __init__(self, server):
        self.http = httpx.Client(base_url=f"{server.url}/api/v1", timeout=60)

    def post(self, route, **body):
        return self.http.post(route, json=body)

    def result(self, submitted):
        """The result of a request that was accepted: a JSON object, or the bytes of a message."""
        response = self.post("/retrieve_future", request_id=submitted["request_id"])
        assert response.status_code == 200, response.text
        return response.json() if response.headers["content-type"] == "application/json" else response.content

    def model(self, session=None, number=0, **lora):
        session = session or self.post("/create_session", tags=[], sdk_version="0").json()["session_id"]
        lora = {"rank": 2, "seed": 0, **lora}
        body = dict(session_id=session, model_seq_id=number, base_model=BASE, lora_config=lora)
        return self.result(self.post("/create_model", **body).json())["model_id"]

    def forward_backward(self, model_id, seq_id, ids=(5, 6, 7, 8), **fields):
        request = sdk.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy", **fields)
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = messages.np.array(ids[:-1], "<i4").tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = messages.np.array(ids[1:], "<i8").tobytes(), sdk.DTYPE_INT64
        return self.http.post("/forward_backward", content=request.SerializeToString(), headers=PROTOBUF)

    def step(self, model_id, seq_id, rate=1e-2):
        return self.post("/optim_step", model_id=model_id, seq_id=seq_id, adam_params={"learning_rate": rate})


@pytest.fixture
def wire(server):
    return Wire(server)


def loss(content):
    output = sdk.ForwardBackwardOutput()
    output.ParseFromString(content)
    return output.metrics["loss:sum"]


def losses_in_order(wire, model_id, steps):
    """Losses of forward_backward and optim_step, one after the other."""
    found = []
    for i in range(steps):
        found.append(loss(wire.result(wire.forward_backward(model_id, 2 * i + 1).json())))
        wire.result(wire.step(model_id, 2 * i + 2).json())
    return found


def test_requests_run_in_the_order_of_their_numbers(wire):
    """Sent backwards and each twice, with the numbers of requests that are sent in order and once."""
    expected = losses_in_order(wire, wire.model(), 3)
    assert len(set(expected)) == 3
    model_id = wire.model()
    send = {1: wire.forward_backward, 0: wire.step}
    submitted = {}
    for seq_id in reversed(range(1, 7)):
        submitted[seq_id] = send[seq_id % 2](model_id, seq_id).json()
        assert send[seq_id % 2](model_id, seq_id).json() == submitted[seq_id]
    assert [loss(wire.result(submitted[seq_id])) for seq_id in (1, 3, 5)] == expected
    assert send[1](model_id, 1).json() == submitted[1]  # and after it has run
    assert loss(wire.result(submitted[1])) == expected[0]  # a reply that was lost on the way is fetched again
    other = wire.step(model_id, 1)
    assert (other.status_code, other.json()["error"]["param"]) == (400, "seq_id")


def test_creations_and_samples_are_repeated_without_a_second_one(wire):
    """The same model, sampler and tokens for the same numbers."""
    session = wire.post("/create_session").json()["session_id"]
    body = dict(session_id=session, model_seq_id=0, base_model=BASE, lora_config={"rank": 2})
    first, again = (wire.post("/create_model", **body).json() for _ in range(2))
    assert first == again
    body = dict(session_id=session, sampling_session_seq_id=0, base_model=BASE)
    sampler, _ = (wire.post("/create_sampling_session", **body).json()["sampling_session_id"] for _ in range(2))
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    body = dict(sampling_session_id=sampler, seq_id=0, num_samples=2, prompt=prompt, sampling_params={"max_tokens": 4})
    first, again = (wire.post("/asample", **body).json() for _ in range(2))
    assert first == again
    assert len(first["sample_sequence_ids"]) == 2
    assert wire.result(first) == wire.result(again)
    assert wire.post("/asample", **{**body, "seq_id": 1}).json() != first


def test_a_sample_can_be_cancelled(wire, server):
    """Its promise fails and its blocks are free, long before its 3,000 tokens are sampled."""
    session = wire.post("/create_session").json()["session_id"]
    body = dict(session_id=session, sampling_session_seq_id=0, base_model=BASE)
    sampler = wire.post("/create_sampling_session", **body).json()["sampling_session_id"]
    params = {"max_tokens": 3000, "seed": 1, "temperature": 1e4}
    body = dict(sampling_session_id=sampler, prompt={"chunks": [{"tokens": [5, 6]}]}, sampling_params=params)
    submitted = wire.post("/asample", **body, num_samples=4).json()
    assert wire.post("/cancel_future", request_id=submitted["request_id"]).status_code == 200
    assert wire.result(submitted)["error"] == "cancelled"
    assert becomes_idle(server)


def test_a_request_that_never_comes_does_not_hold_the_others_for_ever(wire, monkeypatch):
    """Those behind it fail, by name, and the order goes on after them."""
    monkeypatch.setattr(models, "GAP_SECONDS", 0.2)
    model_id = wire.model()
    behind = [wire.forward_backward(model_id, seq_id).json() for seq_id in (3, 2)]
    for submitted in behind:
        assert "1 has not arrived" in wire.result(submitted)["error"]
    assert loss(wire.result(wire.forward_backward(model_id, 4).json())) > 0
    assert wire.step(model_id, 1).status_code == 410


def test_a_request_whose_fields_are_wrong_has_had_its_turn(wire):
    """It fails by the name of the field, and those behind it run as if it had not been: a client has counted it, and
    will never send another of its number."""
    model_id = wire.model()
    wrong = [
        ("/optim_step", dict(adam_params={"learning_rate": None}), "adam_params.learning_rate: "),  # as NaN is sent
        ("/save_weights", dict(path="a", ttl_seconds=0), "ttl_seconds: "),
        ("/save_weights_for_sampler", dict(path=7), "path: "),
        ("/load_weights", dict(path="/etc", optimizer=False), "path: found '/etc'"),
        ("/load_weights", dict(optimizer=False), "path: "),
        ("/save_weights_external", dict(path="a"), "save_weights_external: not supported; save_weights_for_"),
    ]
    for seq_id, (route, fields, message) in enumerate(wrong, 1):
        submitted = wire.post(route, model_id=model_id, seq_id=seq_id, **fields)
        assert submitted.status_code == 200, submitted.text
        result = wire.result(submitted.json())
        assert result["error"].startswith(message)
        assert result["category"] == "user"
    expected = losses_in_order(wire, wire.model(), 1)
    assert [loss(wire.result(wire.forward_backward(model_id, len(wrong) + 1).json()))] == expected


def test_results_that_were_fetched_long_ago_are_gone(wire, server, monkeypatch):
    """410 for their ids, and for a retry of their requests; 404 for what never was an id. What has not been fetched
    stays."""
    model_id = wire.model()
    kept = wire.forward_backward(model_id, 1).json()
    monkeypatch.setattr(promises, "KEPT_BYTES", 4 * promises.PROMISE_BYTES)
    submitted = [wire.forward_backward(model_id, seq_id).json() for seq_id in range(2, 8)]
    for promise in submitted:
        wire.result(promise)
    status = [wire.post("/retrieve_future", **promise).status_code for promise in (submitted[0], submitted[-1], kept)]
    assert status == [410, 200, 200]
    assert wire.forward_backward(model_id, 2).status_code == 410
    for name in ("promise-9999999", "promise-x", "", "../x"):
        response = wire.post("/retrieve_future", request_id=name)
        assert response.status_code == (410 if name == "promise-9999999" else 404)


def test_long_polls_and_large_results(wire, monkeypatch):
    """A result that is not there yet is asked for again; of a large one the size comes first, if it is wanted."""
    monkeypatch.setattr(promises, "LONG_POLL_SECONDS", 0.05)
    monkeypatch.setattr(promises, "LARGE_RESULT", 10)
    model_id = wire.model()
    behind = wire.forward_backward(model_id, 2).json()
    again = wire.result(behind)
    assert (again["type"], again["request_id"], again["queue_state"]) == ("try_again", behind["request_id"], "active")
    wire.forward_backward(model_id, 1)
    monkeypatch.setattr(promises, "LONG_POLL_SECONDS", 30)
    content = wire.result(behind)
    size = wire.post("/retrieve_future", request_id=behind["request_id"], allow_metadata_only=True).json()
    assert size == {"status": "complete_metadata", "response_payload_size": len(content)}


def test_cut_connections(wire, server):
    """Clients that hang up while they send or wait change nothing for the request, or for others."""
    model_id = wire.model()
    submitted = wire.forward_backward(model_id, 2).json()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"request_id": submitted["request_id"]}).encode()
    head = "POST /api/v1/retrieve_future HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for sent in (body, body[:10]):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + sent)
    wire.forward_backward(model_id, 1)
    assert loss(wire.result(submitted)) > 0


@pytest.mark.parametrize("end", ["finished", "silent"])
def test_a_session_that_ends_is_gone(end, engine, tmp_path):
    """410 for all that was its; waiting results are errors; a checkpoint stays."""
    with tinker_server(engine, tmp_path, "--tinker-session-seconds", 3 if end == "silent" else 600) as server:
        wire = Wire(server)
        model_id = wire.model()
        session = model_id.partition(":")[0]
        path = wire.result(wire.post("/save_weights", model_id=model_id, seq_id=1, path="kept").json())["path"]
        waiting = wire.forward_backward(model_id, 3).json()  # 2 never comes
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(wire.result, waiting)
            if end == "finished":
                sleep(2)  # until its request is there
                assert wire.post(f"/sessions/{session}/finish", reason={"type": "success"}).status_code == 200
            assert "the session has ended" in result.result(30)["error"]
        assert wire.post("/session_heartbeat", session_id=session).status_code == 410
        assert wire.post("/retrieve_future", **waiting).status_code == 410
        assert wire.forward_backward(model_id, 2).status_code == 410
        assert wire.post("/get_info", model_id=model_id).status_code == 410
        assert not server.service.tinker.sessions
        assert len(server.service.tinker.promises) == 0
        assert wire.post("/weights_info", tinker_path=path).json()["lora_rank"] == 2


REFUSED = {
    "no such model": (dict(base_model="gpt"), r"base_model: found 'gpt'"),
    "rank 0": (dict(lora_config={"rank": 0}), r"lora_config.rank"),
    "rank beyond the width": (dict(lora_config={"rank": 65536}), r"lora_config.rank: found 65536; accepted: 1 to \d+"),
    "unembed alone": (dict(lora_config={"rank": 2, "train_attn": False, "train_mlp": False}), r"unembedding"),
    "another optimizer": (dict(optimizer_config={"type": "dimuon"}), r"optimizer_config.type: found 'dimuon'"),
    "no config": (dict(lora_config=None), r"lora_config"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_refused_models(label, wire):
    """400, naming the field."""
    change, message = REFUSED[label]
    session = wire.post("/create_session").json()["session_id"]
    body = dict(session_id=session, model_seq_id=0, base_model=BASE, lora_config={"rank": 2})
    response = wire.post("/create_model", **{**body, **change})
    assert response.status_code == 400
    assert re.search(message, response.json()["error"]["message"])


def test_a_restarted_server_knows_no_result_of_the_one_before(engine, tmp_path):
    """A client that polls on across the restart gets 410, not the result of somebody else's request; what was saved can
    be loaded."""
    with tinker_server(engine, tmp_path) as server:
        wire = Wire(server)
        model_id = wire.model()
        path = wire.result(wire.post("/save_weights", model_id=model_id, seq_id=1, path="kept").json())["path"]
        last = wire.forward_backward(model_id, 2).json()
        expected = loss(wire.result(last))
    with tinker_server(engine, tmp_path) as server:
        wire = Wire(server)
        session = wire.post("/create_session").json()["session_id"]
        load = dict(session_id=session, model_seq_id=0, path=path, optimizer=True)
        loaded = wire.result(wire.post("/load_weights", **load).json())["model_id"]
        for seq_id in range(1, 4):
            assert loss(wire.result(wire.forward_backward(loaded, seq_id).json())) == expected
        assert wire.post("/retrieve_future", **last).status_code == 410
        assert wire.forward_backward(model_id, 3).status_code == 404


def mutate(rng, content):
    """Bytes with some changed, cut off or added."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        kind = rng.randrange(3)
        if kind == 0 and content:
            content[rng.randrange(len(content))] = rng.randrange(256)
        elif kind == 1:
            del content[rng.randrange(len(content) + 1) :]
        else:
            content += rng.randbytes(rng.randint(1, 8))
    return bytes(content)


def wrong_tensor(rng):
    """A tensor whose parts do not fit each other."""
    tensor = sdk.Tensor(
        dtype=rng.choice([0, 1, 2, 3, 4, 77]), shape=rng.choice([[], [3], [3, 1], [1 << 40, 3], [-1], [3, 0]])
    )
    if rng.random() < 0.5:
        tensor.dense = rng.randbytes(rng.choice([0, 3, 8, 24, 25]))
    else:
        sizes = [rng.choice([0, 4, 8, 24, 32]) for _ in range(3)]
        tensor.sparse_csr.values, tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices = map(
            rng.randbytes, sizes
        )
    return tensor


def wrong_request(rng, model_id, seq_id):
    """A ForwardBackwardRequest that is wrong in what it holds."""
    losses = ["cross_entropy", "importance_sampling", "ppo", "dro", "", "custom", "\0"]
    request = sdk.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn=rng.choice(losses))
    for _ in range(rng.randrange(3)):
        datum = request.data.add()
        for _ in range(rng.randrange(3)):
            chunk = datum.model_input.add()
            if rng.random() < 0.8:
                chunk.encoded_text.tokens = rng.choice([b"", b"abc", b"\5\0\0\0", b"\5\0\0\0" * 3, b"\xff" * 12])
            else:
                chunk.image.data = b"x"
        for name in ("target_tokens", "weights", "logprobs", "advantages", "mask"):
            if rng.random() < 0.7:
                datum.loss_fn_inputs[name].CopyFrom(wrong_tensor(rng))
    if rng.random() < 0.3:
        request.loss_fn_config["beta"] = float("nan")
    if rng.random() < 0.2:
        request.loss_fn_config_v2["loss_id"].text = "x"
    request.forward_only = rng.random() < 0.3
    return request.SerializeToString()


JSON_VALUES = [None, -1, 0, 1, 2**63, 1e300, "", "x", [], {}, [None], {"a": 1}, True, "tinker://a/b/c", "promise-0"]
JSON_PATHS = [
    "/create_session", "/session_heartbeat", "/create_model", "/get_info", "/optim_step", "/save_weights", "/asample",
    "/save_weights_for_sampler", "/load_weights", "/create_sampling_session", "/retrieve_future", "/weights_info",
    "/cancel_future", "/join_sampling_session",
]  # fmt: skip
JSON_FIELDS = [
    "session_id", "model_id", "seq_id", "model_seq_id", "base_model", "lora_config", "adam_params", "path", "prompt",
    "optimizer", "request_id", "sampling_session_id", "sampling_session_seq_id", "model_path", "sampling_params",
    "tinker_path", "num_samples", "ttl_seconds", "user_metadata",
]  # fmt: skip


class Fuzzer:
    """Sends requests that are wrong in many ways, for a model that none may hurt."""

    def __init__(self, wire):
        self.wire, self.rng, self.seq_id = wire, random.Random(7), 1
        self.session = wire.post("/create_session").json()["session_id"]
        body = dict(session_id=self.session, sampling_session_seq_id=0, base_model=BASE)
        sampler = wire.post("/create_sampling_session", **body).json()["sampling_session_id"]
        self.victim = wire.model()
        self.good = {
            "session_id": self.session, "model_id": wire.model(self.session), "base_model": BASE,
            "lora_config": {"rank": 2}, "prompt": {"chunks": [{"tokens": [5, 6]}]},
            "sampling_params": {"max_tokens": 2},
            "model_path": "tinker://a/b/c", "path": "tinker://a/weights/b", "sampling_session_id": sampler,
        }  # fmt: skip
        request = sdk.ForwardBackwardRequest(model_id=self.victim, loss_fn="cross_entropy")
        self.valid = request.SerializeToString()

    def send(self, kind):
        """The response to a request of wrong contents, of wrong bytes, or of wrong fields."""
        rng, http = self.rng, self.wire.http
        if kind == 0:
            content = wrong_request(rng, self.victim, self.seq_id)
            self.seq_id += 1
            return http.post("/forward_backward", content=content, headers=PROTOBUF)
        if kind == 1:
            return http.post("/forward_backward", content=mutate(rng, self.valid), headers=PROTOBUF)
        body = {name: rng.choice(JSON_VALUES) for name in JSON_FIELDS if rng.random() < 0.4}
        body |= {name: self.good[name] for name in self.good if rng.random() < 0.5}
        return self.wire.post(rng.choice(JSON_PATHS), **body)

    def run(self, count):
        """Each response is good or a named error, and each result a good one or an error of the user's."""
        accepted = []
        for number in range(count):
            response = self.send(number % 3)
            assert response.status_code < 500, response.text
            assert number % 3 or response.status_code == 200
            if response.status_code >= 400:
                assert response.json()["error"]["message"]
            elif "request_id" in response.json():
                accepted.append(response.json())
        wrong = [self.wire.result(promise) for promise in accepted if promise.get("model_id") == self.victim]
        assert len(wrong) >= count // 3
        for result in wrong:
            if isinstance(result, dict) and "error" in result:
                assert result["category"] == "user", result
        for session in self.wire.http.get("/sessions?limit=1000").json()["sessions"]:
            if session not in (self.session, self.victim.partition(":")[0]):
                assert self.wire.post(f"/sessions/{session}/finish").status_code == 200


def resident_bytes():
    """Of this process, once free memory has gone back to the system."""
    gc.collect()
    return_freed_memory()
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident memory is read from /proc")
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def test_wrong_requests_get_named_errors(server, wire):
    """2,000 requests that are wrong in many ways: 4xx, or a failed promise of the user's; none is 5xx or hangs, and the
    server then does its work as before. The last 1,000 leave less than 2 KB each: that is what a promise takes whose
    result is kept for a client whose connection was cut, and every third has one."""
    expected = losses_in_order(wire, wire.model(), 2)
    fuzzer = Fuzzer(wire)
    fuzzer.run(1000)
    before = resident_bytes()
    fuzzer.run(1000)
    assert resident_bytes() - before < 1000 * promises.PROMISE_BYTES
    assert losses_in_order(wire, wire.model(), 2) == expected
    for session in list(server.service.tinker.sessions):
        assert wire.post(f"/sessions/{session}/finish").status_code == 200
    assert len(server.service.tinker.promises) == 0
    assert becomes_idle(server)


def test_messages_are_those_of_the_sdk():
    """Our field numbers and types against the SDK's own descriptors, message by message."""
    names = {"EncodedText": "EncodedTextChunk", "Image": "ImageChunk", "Audio": "DmelChunk"}
    for name in messages.MESSAGES:
        ours = messages.new_message(name).DESCRIPTOR
        theirs = getattr(sdk, names.get(name, name)).DESCRIPTOR
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            kinds = {field.type, other.type} - {sdk.Tensor.DESCRIPTOR.fields_by_name["dtype"].type}
            assert field.number == other.number
            assert len(kinds) == 1 or other.enum_type is not None
            assert field.is_repeated == other.is_repeated


def test_data_of_a_whole_model_length(wire, engine):
    """One token fewer than the model's length: the last prediction needs a place for its target."""
    longest = engine.config.max_position_embeddings
    ids = (ids_of(1, longest, seed=1)[0] * 2)[:longest]
    model_id = wire.model()
    assert loss(wire.result(wire.forward_backward(model_id, 1, ids).json())) > 0
