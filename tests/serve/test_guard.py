"""Who may come in, with what, and from where adapters may be loaded."""

import base64
import json
import os
import socket

import httpx
import pytest
from serving import running

from seal_engine import InputError, SamplingParams
from seal_engine.cli.main import main
from seal_engine.serve.guard import Key, is_loopback
from seal_engine.serve.server import listen
from seal_engine.tiny import MODEL

KEY = "a-long-enough-key"
BODY = {"prompt": "A", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(engine):
    with running(engine, key=KEY) as server:
        yield server


def test_without_the_key_nobody_gets_in_anywhere(locked, caplog):
    """Every route that the OpenAPI page lists, and every other path; a liveness probe alone needs none. The key is in
    no log and no error."""
    page = httpx.get(f"{locked.url}/openapi.json", headers={"X-API-Key": KEY}).json()
    routes = [(method, path) for path, methods in page["paths"].items() for method in methods]
    assert len(routes) >= 13
    basic = base64.b64encode(b"user:wrong-key").decode()
    wrong = [{}, {"Authorization": "Bearer wrong-key"}, {"X-API-Key": "wrong"}, {"Authorization": f"Basic {basic}"}]
    wrong += [{"Authorization": "Basic !"}, {"Authorization": KEY}, {"X-API-Key": f"{KEY}x"}, {"X-API-Key": KEY[:-1]}]
    wrong += [{"Authorization": "Bearer \xe9"}]
    with httpx.Client(base_url=locked.url) as client:
        for method, path in [*routes, ("get", "/openapi.json"), ("get", "/nowhere"), ("post", "/v1//models")]:
            for headers in wrong if path == "/v1/models" else wrong[:2]:
                encoded = {name: value.encode("latin-1") for name, value in headers.items()}
                reply = client.request(method.upper(), path, headers=encoded)
                assert reply.status_code == (200 if path == "/health" else 401), (method, path)
                if path != "/health":
                    assert reply.json()["error"]["code"] == 401
                    assert KEY not in reply.text
    assert KEY not in caplog.text
    assert KEY not in repr(Key(KEY))


def test_with_the_key_in_each_form(locked):
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    forms = [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}, {"Authorization": f"Basic {basic}"}]
    for headers in forms:
        assert httpx.post(f"{locked.url}/v1/completions", json=BODY, headers=headers).status_code == 200
        assert httpx.get(locked.url, headers=headers).status_code == 200
    assert httpx.get(f"{locked.url}/v1/models", headers={**forms[0], "Host": "example.org"}).status_code == 200


def test_a_page_that_was_led_here_is_refused(server):
    """Without a key, a request under another name comes from a browser that resolved somebody's name to loopback."""
    for host, status in (("example.org", 403), ("localhost:1", 200), ("[::1]:80", 200), ("127.0.0.9", 200)):
        assert httpx.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status
    assert [is_loopback(host) for host in ("::1", "localhost", "0.0.0.0", "", "10.0.0.1", "localhost.example.org")] == [
        *(True, True),
        *(False, False, False, False),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host: found '0.0.0.0'; accepted: a loopback address, or --api-key-env"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "--api-key-env: found 'nothing'"),
        (["--api-key-env", "SHORT_KEY"], "--api-key-env: found 'another value (not shown)'"),
        (["--port", "70000"], "--port: found 70000"),
        (["--adapter", "name"], "--adapter: found 'name'; accepted: NAME=DIR"),
        (["--adapter", "a=/nowhere"], "--adapter a: /nowhere"),
        (["--adapter", "model=/nowhere"], "--adapter model: lora_name: found 'model'"),
        (["--allow-adapters-from", "/nowhere"], "--allow-adapters-from: found '/nowhere'"),
        (["--seal-port", "-1"], "--seal-port: found -1"),
        (["--seal-port", "0", "--grader", "endpoint"], "--endpoint: found None"),
        (["--seal-port", "0", "--seed", "-1"], "--seed: found -1"),
        (["--training-share", "1"], "--training-share: found 1.0"),
        (["--max-queue", "0"], "--max-queue: found 0"),
        (["--chat-template", "/nowhere"], "--chat-template: found '/nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line_are_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "short")
    assert main(["serve", "--model", str(MODEL), "--kv-blocks", "10", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"seal-engine: {message}")
    assert len(captured.err.splitlines()) == 1
    assert "short" not in captured.err.replace("shown", "")


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("seal_engine.cli.serve.find_spec", lambda name: None if name == "zmq" else object())
    assert main(["serve", "--model", str(MODEL)]) == 2
    assert "serve: found no zmq; accepted: pip install 'seal-engine[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken(engine):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: 127.0.0.1:{port}: "):
            listen("127.0.0.1", port)


def test_bodies_have_a_limit(engine):
    """Announced or not; what is within it is served."""
    with running(engine, "--max-body", "2000") as server, httpx.Client(base_url=server.url) as client:
        large = json.dumps({"prompt": "A" * 3000})
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/completions", content=large, headers=headers).status_code == 413
        pieces = (large[i : i + 100].encode() for i in range(0, len(large), 100))
        reply = client.post("/v1/completions", content=pieces, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, 413)
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_a_full_queue_is_429(engine):
    """All or none of a request's prompts; a request that no queue could take is 400."""
    with running(engine, "--max-queue", "3") as server, httpx.Client(base_url=server.url) as client:
        long = {"prompt": ["A"] * 2, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as running_stream:
            lines = running_stream.iter_lines()
            next(lines)
            reply = httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": ["A", "B"]})
            assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
            assert reply.json()["error"]["type"] == "RateLimitError"
            assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 200
        assert client.post("/v1/completions", json={**BODY, "prompt": ["A"] * 4}).status_code == 400


# Adapters


def load(server, name, path, **more):
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(server, name):
    return httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name})


def ask(server, name):
    body = {"model": name, "prompt": "What does Ann collect?", "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{server.url}/v1/completions", json=body)
    return reply.status_code, reply.json()["choices"][0]["text"] if reply.status_code == 200 else None


def test_adapters_come_and_go(engine, make_adapter, tmp_path):
    """A name that is loaded again has the new adapter's answers, though the prompt's K/V under the old one are still
    cached; an unloaded one is 404, never the base."""
    for seed in (5, 6):
        make_adapter(seed).save(tmp_path / str(seed))
    wanted = {
        seed: engine.generate(
            ["What does Ann collect?"],
            SamplingParams(temperature=0, max_tokens=8),
            engine.load_adapter(tmp_path / str(seed)),
            progress=False,
        )[0]
        .outputs[0]
        .text
        for seed in (5, 6)
    }
    assert wanted[5] != wanted[6]
    with running(engine, "--allow-adapters-from", tmp_path, "--max-adapters", "1") as server:
        assert ask(server, "x") == (404, None)
        assert load(server, "x", tmp_path / "5").status_code == 200
        assert ask(server, "x") == (200, wanted[5])
        assert ask(server, "x") == (200, wanted[5])
        again = load(server, "x", tmp_path / "6")
        assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
        assert load(server, "y", tmp_path / "6").status_code == 400  # beyond --max-adapters
        assert load(server, "x", tmp_path / "6", load_inplace=True).status_code == 200
        assert ask(server, "x") == (200, wanted[6])
        assert unload(server, "x").status_code == 200
        assert unload(server, "x").status_code == 404
        assert ask(server, "x") == (404, None)
        assert load(server, "x", tmp_path / "5").status_code == 200
        assert ask(server, "x") == (200, wanted[5])
        assert load(server, MODEL.name, tmp_path / "5").status_code == 400  # the base's name


def test_no_way_out_of_the_allowed_directory(engine, make_adapter, tmp_path):
    """Neither by .., nor by a link to a directory, nor by one in place of a file; a link within is followed."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    make_adapter(1).save(inside / "good")
    make_adapter(2).save(outside / "secret")
    (inside / "link").symlink_to(outside / "secret")
    (inside / "fine").symlink_to(inside / "good")
    mixed = inside / "mixed"
    mixed.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (mixed / name).symlink_to(outside / "secret" / name)
    pickled = inside / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text((inside / "good/adapter_config.json").read_text())
    (pickled / "adapter_model.bin").write_bytes(b"pickle")
    refused = [
        *(outside / "secret", inside / "../outside/secret", inside / "link", mixed, "/etc", "\0", "good", f"{inside}x"),
        *(os.path.relpath(outside / "secret"), "file:///etc", "//etc/passwd", inside / "link/../secret"),
    ]
    with running(engine, "--allow-adapters-from", inside) as server:
        for path in refused:
            reply = load(server, "x", path)
            assert reply.status_code == 400, path
            assert "--allow-adapters-from" in reply.json()["error"]["message"]
        reply = load(server, "x", pickled)
        assert reply.status_code == 400
        assert "pickled adapters (.bin) are not read" in reply.json()["error"]["message"]
        assert load(server, "x", inside / "nothing").status_code == 404
        assert httpx.get(f"{server.url}/v1/models").json()["data"][1:] == []
        assert load(server, "x", inside / "fine").status_code == 200
    with running(engine) as server:
        assert load(server, "x", inside / "good").status_code == 400  # nothing is allowed by default
