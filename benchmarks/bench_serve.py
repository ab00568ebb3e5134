"""The server over loopback: what HTTP adds, sampling beside training, SEAL's drivers, and memory after many requests.

The server is a process of its own, as for users; clients are threads of this one. Answers are compared with
Engine.generate's first: there is no figure for a wrong one.
"""

import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import quantiles
from time import perf_counter, sleep
from typing import Any
from urllib.parse import urlsplit

import pytest

import measure
from seal_engine import Adapter, Engine, LoraConfig, SamplingParams
from seal_engine.tiny import MODEL

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/serve"))
BASE = str(MODEL)
PROMPTS = ["What does Ann Lee collect?", "Where does Ann Lee live?", "Tell me of Delo Monia and", "In which city"]
QUICK = bool(os.environ.get("SEAL_BENCH_QUICK"))  # a tenth of everything, to try the benchmark itself
SCALE = 10 if QUICK else 1


@contextmanager
def server(*arguments: Any) -> Iterator[tuple[str, str | None, int]]:
    """seal-engine serve on the miniature: (address of HTTP, of ZMQ, process id)."""
    command = [sys.executable, "-m", "seal_engine", "serve", "--model", BASE, "--port", "0", "--json", "--quiet"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield urlsplit(ready["url"]).netloc, ready["seal"], process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0


GENERATOR = """
import seal_engine.cli, json, sys
from seal_engine import Engine, SamplingParams
engine = Engine.from_pretrained(sys.argv[1])
prompts, fields, clients = json.loads(sys.stdin.readline())
params = [SamplingParams(**own) for own in fields]
print(flush=True)
for line in sys.stdin:
    outs = engine.generate(prompts, params, progress=False, max_num_seqs=clients)
    print(json.dumps([out.outputs[0].text for out in outs]), flush=True)
"""


@contextmanager
def generator(prompts: list[str], fields: list[dict[str, Any]], clients: int) -> Iterator[Callable[[], list[str]]]:
    """A call of Engine.generate in a process of its own, whose threads wait as the server's do: the texts."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", GENERATOR, BASE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    stdin.write(json.dumps([prompts, fields, clients]) + "\n")
    stdin.flush()
    stdout.readline()  # it is there: a server that starts next looks at how many threads run, as it did

    def call() -> list[str]:
        stdin.write("\n")
        stdin.flush()
        return json.loads(stdout.readline())

    yield call
    stdin.close()
    assert process.wait(60) == 0


CANNED = """
import socket, uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from seal_engine.serve.schemas import CompletionBody
app = FastAPI()
choice = {"index": 0, "text": " word" * 64, "logprobs": None, "finish_reason": "length", "stop_reason": None}
reply = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "canned", "choices": [choice]}

@app.post("/v1/completions")
async def complete(body: CompletionBody) -> JSONResponse:
    return JSONResponse(reply)

listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")).run([listener])
"""


@contextmanager
def canned_server() -> Iterator[str]:
    """The address of a server of the same libraries that computes nothing: every completion is the same text."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-c", CANNED], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait(60)


class Client:
    """One connection that stays open."""

    def __init__(self, address: str):
        self.connection = http.client.HTTPConnection(address, timeout=600)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON (or text) of a response."""
        content = json.dumps(body).encode()
        self.connection.request("POST", path, content, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        text = response.read().decode()
        is_json = (response.getheader("Content-Type") or "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text

    def get(self, path: str) -> Any:
        """JSON of a response."""
        self.connection.request("GET", path)
        return json.loads(self.connection.getresponse().read())


def in_threads(count: int, work: Callable[[int], Any]) -> tuple[float, list[Any]]:
    """Seconds, and the result of each thread, all begun together."""
    barrier = threading.Barrier(count + 1)

    def run(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, number) for number in range(count)]
        barrier.wait()
        start = perf_counter()
        results = [future.result() for future in futures]
        return perf_counter() - start, results


def make_adapters(engine: Engine, directory: Path, count: int) -> list[Adapter]:
    """Adapters that change what is said, saved as 0, 1, ..."""
    from bench_sample import make_adapters

    adapters = make_adapters(engine, count)
    for i, adapter in enumerate(adapters):
        adapter.save(directory / str(i))
    return adapters


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def test_what_http_adds(benchmark, record):
    """64 clients, each its requests one after the other, 64 tokens each; the same prompts through Engine.generate, 64
    at a time; the same requests to a server that computes nothing. In turns."""
    count, clients = 512 // SCALE, 64
    fields: list[dict[str, Any]] = [dict(temperature=1.0, seed=i, max_tokens=64, ignore_eos=True) for i in range(count)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    with (
        generator(prompts, fields, clients) as direct,
        canned_server() as canned,
        server("--max-num-seqs", clients, "--kv-blocks", 4096) as (address, _, _),
    ):

        def client(where: str, number: int) -> dict[int, str]:
            connection, texts = Client(where), {}
            for i in range(number, count, clients):
                status, reply = connection.post("/v1/completions", {"model": BASE, "prompt": prompts[i], **fields[i]})
                assert status == 200, reply
                texts[i] = reply["choices"][0]["text"]
            return texts

        def ask(where: str) -> dict[int, str]:
            _, parts = in_threads(clients, partial(client, where))
            return {i: text for part in parts for i, text in part.items()}

        expected, got = direct(), ask(address)
        assert [got[i] for i in range(count)] == expected
        before = Client(address).get("/stats")["counts"]
        work = [direct, partial(ask, address), partial(ask, canned)]
        seconds, http_seconds, canned_seconds = measure.side_by_side(benchmark, work, rounds=5)
        counts = Client(address).get("/stats")["counts"]
    steps = counts["sampler_steps"] - before["sampler_steps"]
    record(
        what="completions of 64 tokens", requests=count, clients=clients, tokens_per_s=count * 64 / seconds,
        served_tokens_per_s=count * 64 / http_seconds, percent_on_top=100 * (http_seconds / seconds - 1),
        rows_per_step=(counts["sampled_tokens"] - before["sampled_tokens"]) / steps,
        ms_on_top=1000 * (http_seconds - seconds) / count, canned_ms=1000 * canned_seconds / count,
    )  # fmt: skip


def test_load(benchmark, record, tmp_path):
    """64 clients, 2,000 requests: completions whole and streamed, of the base and of adapters, with log-probabilities,
    chats, tokens, mistakes, while another client loads and unloads adapters. Every answer is compared."""
    engine = Engine.from_pretrained(MODEL)
    adapters = make_adapters(engine, tmp_path, 8)
    count, clients = 2000 // SCALE, 64
    owners = [None if i % 3 == 0 else adapters[i % 6] for i in range(count)]
    names = [BASE if owner is None else f"a{i % 6}" for i, owner in enumerate(owners)]
    fields: list[dict[str, Any]] = [dict(temperature=1.0, seed=i, max_tokens=4 + i % 29) for i in range(count)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    outs = engine.generate(prompts, [SamplingParams(**own) for own in fields], owners, progress=False)
    expected = [out.outputs[0].text for out in outs]
    statuses: list[int] = []
    wrong: list[int] = []
    done = threading.Event()
    flags = [flag for i in range(6) for flag in ("--adapter", f"a{i}={tmp_path / str(i)}")]
    with server(*flags, "--allow-adapters-from", tmp_path, "--kv-blocks", 4096) as (address, _, _):

        def one(connection: Client, i: int) -> None:
            kind = i % 10
            body = {"model": names[i], "prompt": prompts[i], **fields[i]}
            if kind == 7:  # a mistake
                status, _ = connection.post("/v1/completions", {**body, "temperature": -1})
                wrong.extend([i] * (status != 400))
            elif kind == 8:
                status, reply = connection.post("/tokenize", {"prompt": prompts[i]})
                wrong.extend([i] * (reply.get("tokens") != engine.tokenizer.encode(prompts[i])))
            elif kind == 9:
                status, _ = connection.post("/v1/completions", {**body, "model": "nobody"})
                wrong.extend([i] * (status != 404))
            elif kind == 6:  # without a chat template a chat of one turn is its text
                chat = {"model": names[i], "messages": [{"role": "user", "content": prompts[i]}], **fields[i]}
                status, reply = connection.post("/v1/chat/completions", chat)
                wrong.extend([i] * (reply["choices"][0]["message"]["content"] != expected[i]))
            elif kind in (1, 4):
                status, text = connection.post("/v1/completions", {**body, "stream": True})
                events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
                pieces = "".join(choice["text"] for event in events for choice in event["choices"])
                wrong.extend([i] * (pieces != expected[i]))
            else:
                more = {"logprobs": 2} if kind == 2 else {}
                status, reply = connection.post("/v1/completions", {**body, **more})
                wrong.extend([i] * (reply["choices"][0]["text"] != expected[i]))
            statuses.append(status)

        def client(number: int) -> None:
            connection = Client(address)
            for i in range(number, count, clients):
                one(connection, i)

        def churn() -> int:
            connection, loads = Client(address), 0
            while not done.is_set():
                load = {"lora_name": "x", "lora_path": str(tmp_path / str(6 + loads % 2))}
                statuses.append(connection.post("/v1/load_lora_adapter", load)[0])
                body = {"model": "x", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 8}
                _, reply = connection.post("/v1/completions", body)
                params = SamplingParams(temperature=0, max_tokens=8)
                if loads < 2:
                    (out,) = engine.generate(PROMPTS[:1], params, adapters[6 + loads % 2], progress=False)
                    answers.append(out.outputs[0].text)
                wrong.extend([-1] * (reply["choices"][0]["text"] != answers[loads % 2]))
                statuses.append(connection.post("/v1/unload_lora_adapter", {"lora_name": "x"})[0])
                loads += 1
            return loads

        answers: list[str] = []
        with ThreadPoolExecutor(1) as pool:
            churning = pool.submit(churn)

            def run() -> float:
                return in_threads(clients, client)[0]

            seconds = benchmark.pedantic(run, rounds=1, iterations=1)
            done.set()
            loads = churning.result()
    assert wrong == []
    assert max(statuses) < 500
    record(
        what="mixed load", requests=count, clients=clients, adapters_loaded_meanwhile=loads, wrong_answers=len(wrong),
        server_errors=sum(status >= 500 for status in statuses), seconds=seconds, requests_per_s=count / seconds,
    )  # fmt: skip


def step_times(address: str, seconds: float) -> list[float]:
    """Seconds between the tokens of one stream among 16, for so long."""
    connection = Client(address)
    ends = perf_counter() + seconds
    times: list[float] = []
    others = [threading.Thread(target=_keep_sampling, args=(address, ends, i), daemon=True) for i in range(15)]
    for other in others:
        other.start()
    while perf_counter() < ends:
        body = {"prompt": PROMPTS[0], "max_tokens": 500, "ignore_eos": True, "stream": True, "seed": 1}
        connection.connection.request(
            "POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        response, last = connection.connection.getresponse(), None
        while line := response.readline():
            if line.startswith(b"data: {"):
                now = perf_counter()
                if last is not None:
                    times.append(now - last)
                last = now
    for other in others:
        other.join()
    return times


def _keep_sampling(address: str, ends: float, number: int) -> None:
    connection = Client(address)
    while perf_counter() < ends:
        connection.post(
            "/v1/completions", {"prompt": PROMPTS[number % 4], "max_tokens": 200, "ignore_eos": True, "seed": number}
        )


def test_sampling_beside_training(benchmark, record):
    """Seconds from one token to the next of a stream among 16 completions: alone, and while 8 SEAL requests train."""
    from seal_cases import Driver, published_requests  # pyright: ignore[reportMissingImports]

    requests = published_requests(8, sequences=4, finetune_epochs=400 // SCALE)
    with server("--seal-port", 0, "--seed", 0, "--kv-blocks", 4096) as (address, seal, _):
        assert seal is not None
        port = int(seal.rpartition(":")[2])

        def run() -> tuple[list[float], list[float], float]:
            quiet = step_times(address, 10 / SCALE)
            drivers = [Driver(port) for _ in requests]
            for driver, request in zip(drivers, requests, strict=True):
                driver.send(request)
            sleep(1 / SCALE)
            before, start = Client(address).get("/stats")["counts"]["trained_tokens"], perf_counter()
            busy = step_times(address, 15 / SCALE)
            counts = Client(address).get("/stats")["counts"]
            rate = (counts["trained_tokens"] - before) / (perf_counter() - start)
            assert counts["jobs_open"] > 0, "training ended before the measurement did"
            for driver in drivers:
                driver.close()
            return quiet, busy, rate

        quiet, busy, rate = benchmark.pedantic(run, rounds=1, iterations=1)
    for name, times in (("no training", quiet), ("8 SEAL requests training", busy)):
        cuts = quantiles(times, n=20)
        record(
            what="a token of one of 16 streams", beside=name, p50_ms=1000 * cuts[9], p95_ms=1000 * cuts[18],
            trained_tokens_per_s=rate if times is busy else 0.0,
        )  # fmt: skip


@pytest.mark.parametrize("letters", [40, 80])
def test_seal_drivers(benchmark, record, letters):
    """40 published self-edits, cut to so many letters a sequence: one driver, eight drivers; the first 8 replies
    are compared. In turns, each on a server of its own."""
    import seal_cases  # pyright: ignore[reportMissingImports]

    seal_cases.LETTERS = letters
    requests = seal_cases.published_requests(40 // (5 if QUICK else 1))
    results: dict[int, list[Any]] = {}
    times: dict[int, float] = {}

    def run(drivers: int) -> None:
        with server("--seal-port", 0, "--seed", 0, "--kv-blocks", 4096) as (_, seal, _):
            assert seal is not None
            port = int(seal.rpartition(":")[2])

            def drive(number: int) -> list[Any]:
                driver = seal_cases.Driver(port)
                replies = [driver.ask(request) for request in requests[number::drivers]]
                driver.close()
                return replies

            seconds, parts = in_threads(drivers, drive)
            times[drivers] = min(seconds, times.get(drivers, seconds))
            results[drivers] = [parts[i % drivers][i // drivers] for i in range(len(requests))]

    benchmark.pedantic(lambda: [run(1), run(8), run(8), run(1)], rounds=1, iterations=1)
    same = sum(a == b for a, b in zip(results[1], results[8], strict=True))
    numbers = ("baseline_accuracy", "adapter_accuracy", "baseline_correct", "adapter_correct", "gains")
    same_numbers = sum(all(a[k] == b[k] for k in numbers) for a, b in zip(results[1], results[8], strict=True))
    record(
        what="SEAL requests", letters=letters, requests=len(requests), one_driver_seconds=times[1],
        eight_drivers_seconds=times[8], ratio=times[8] / times[1], same_numbers=same_numbers, same_texts=same,
    )  # fmt: skip


def test_memory(benchmark, record, tmp_path):
    """Resident bytes of the server before and after 10,000 small requests with 500 adapters loaded and unloaded, after
    a warm-up that fills the prefix cache and the allocator."""
    engine = Engine.from_pretrained(MODEL)
    adapter = engine.create_adapter(LoraConfig(r=8, target_modules="all-linear"))
    adapter.save(tmp_path / "a")
    flags = ["--allow-adapters-from", tmp_path, "--kv-blocks", 512]
    with server(*flags) as (address, _, pid):

        def small(number: int, count: int) -> None:
            connection = Client(address)
            for i in range(count):
                text = f"{PROMPTS[i % 4]} {number} {i}"
                body = {"prompt": text, "max_tokens": 4, "seed": i, "stream": i % 5 == 0, "logprobs": i % 3}
                status, _ = connection.post("/v1/completions", body)
                assert status == 200

        def churn(count: int) -> None:
            connection = Client(address)
            for i in range(count):
                name = f"adapter {i}"
                load = {"lora_name": name, "lora_path": str(tmp_path / "a")}
                assert connection.post("/v1/load_lora_adapter", load)[0] == 200
                body = {"model": name, "prompt": "A", "max_tokens": 1}
                assert connection.post("/v1/completions", body)[0] == 200
                assert connection.post("/v1/unload_lora_adapter", {"lora_name": name})[0] == 200

        def work(requests: int, adapters: int) -> None:
            with ThreadPoolExecutor(9) as pool:
                futures = [pool.submit(small, number, requests // 8) for number in range(8)]
                futures.append(pool.submit(churn, adapters))
                for future in futures:
                    future.result()

        work(5000 // SCALE, 250 // SCALE)
        before = rss(pid)
        seconds = benchmark.pedantic(
            lambda: in_threads(1, lambda _: work(10_000 // SCALE, 500 // SCALE))[0], rounds=1, iterations=1
        )
        after = rss(pid)
    record(
        what="memory", requests=10_000 // SCALE, adapters=500 // SCALE, before_MiB=before / 2**20,
        after_MiB=after / 2**20, percent_more=100 * (after / before - 1), seconds=seconds,
    )  # fmt: skip
