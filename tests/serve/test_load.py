"""A short form of benchmarks/bench_serve.py: mixed requests while adapters come and go, and nothing is left behind."""

import asyncio
import gc
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
from serving import idle, running

from seal_engine import Adapter, SamplingParams
from seal_engine.sampling.scheduler import Request, Sequence
from seal_engine.serve.requests import SampleRequest, TrainRequest
from seal_engine.tiny import MODEL

PROMPTS = ["What does Ann collect?", "Where does", "Delo Monia is", "In which city"]


def test_mixed_requests_while_adapters_come_and_go(server, engine, adapters):
    """16 clients, 160 requests of five kinds: every answer is right, and no status is 5xx."""
    names = [str(MODEL), "ann", "bob"]
    owners = [None, adapters["ann"][0], adapters["bob"][0]]
    fields = [dict(temperature=1.0, seed=i, max_tokens=3 + i % 9) for i in range(160)]
    outs = engine.generate(
        [PROMPTS[i % 4] for i in range(160)],
        [SamplingParams(**own) for own in fields],
        [owners[i % 3] for i in range(160)],
        progress=False,
    )
    expected = [out.outputs[0].text for out in outs]
    wrong, statuses, done = [], Counter(), threading.Event()

    def client(number):
        with httpx.Client(base_url=server.url, timeout=60) as connection:
            for i in range(number, 160, 16):
                body = {"model": names[i % 3], "prompt": PROMPTS[i % 4], **fields[i]}
                kind = (i // 16) % 5
                if kind == 3:
                    reply = connection.post("/v1/completions", json={**body, "model": "nobody"})
                    wrong.extend([i] * (reply.status_code != 404))
                elif kind == 4:
                    reply = connection.post("/tokenize", json={"prompt": body["prompt"]})
                    wrong.extend([i] * (reply.json()["tokens"] != engine.tokenizer.encode(body["prompt"])))
                else:
                    reply = connection.post("/v1/completions", json={**body, "logprobs": 2 if kind == 1 else None})
                    wrong.extend([i] * (reply.json()["choices"][0]["text"] != expected[i]))
                statuses[reply.status_code] += 1

    def churn():
        with httpx.Client(base_url=server.url, timeout=60) as connection:
            number = 0
            while not done.is_set():
                path = adapters[("ann", "bob")[number % 2]][1]
                load = {"lora_name": "x", "lora_path": str(path)}
                statuses[connection.post("/v1/load_lora_adapter", json=load).status_code] += 1
                body = {"model": "x", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 6}
                texts = [
                    connection.post("/v1/completions", json={**body, "model": name}).json()["choices"][0]["text"]
                    for name in ("x", ("ann", "bob")[number % 2])
                ]
                wrong.extend(["x"] * (texts[0] != texts[1]))
                statuses[connection.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code] += 1
                number += 1

    with ThreadPoolExecutor(17) as pool:
        churning = pool.submit(churn)
        for future in [pool.submit(client, number) for number in range(16)]:
            future.result()
        done.set()
        churning.result()
    assert wrong == []
    assert set(statuses) == {200, 404}
    assert idle(server)


async def turns_of_the_loop():
    for _ in range(100):
        await asyncio.sleep(0)


def live(server):
    """Living objects of the kinds that requests are made of, once the worker's turn and the loop's tasks have ended: a
    client has its answer a moment before they let go of the request."""
    server.service.worker.call(lambda _: None).result()
    asyncio.run_coroutine_threadsafe(turns_of_the_loop(), server._loop).result()
    gc.collect()
    kinds = (Adapter, Request, Sequence, SampleRequest, TrainRequest)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds)


def test_nothing_is_left_of_requests_and_adapters(engine, adapters):
    """As many objects after 300 requests and 20 adapters as after the first few; the sampler and the trainer remember
    none. Resident memory over 10,000 requests is bench_serve.py's to measure."""
    directory = adapters["ann"][1]
    with running(engine, "--allow-adapters-from", directory) as server, httpx.Client(base_url=server.url) as client:

        def work(requests, loads):
            for i in range(requests):
                body = {"prompt": f"{PROMPTS[i % 4]} {i}", "max_tokens": 2, "n": 1 + i % 2, "stream": i % 3 == 0}
                assert client.post("/v1/completions", json=body).status_code == 200
            for i in range(loads):
                load = {"lora_name": f"x{i}", "lora_path": str(directory)}
                assert client.post("/v1/load_lora_adapter", json=load).status_code == 200
                body = {"model": f"x{i}", "prompt": "A", "max_tokens": 1}
                assert client.post("/v1/completions", json=body).status_code == 200
                assert client.post("/v1/unload_lora_adapter", json={"lora_name": f"x{i}"}).status_code == 200
            assert client.post("/v1/completions", json={"prompt": "A", "max_tokens": 1}).status_code == 200

        work(6, 2)
        before = live(server)
        work(300, 20)
        assert live(server) == before
        assert server.service.worker.sampler._requests == {}
