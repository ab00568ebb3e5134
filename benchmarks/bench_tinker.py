"""The Tinker API over loopback: what the wire adds to a request, and 32 tenants together beside one after the other.

The server is a process of its own, as for users; the SDK is the client. Losses are compared with Engine's first: there
is no figure for a wrong one. Engine then trains all tenants, too, in this process: a server that added nothing to that
would be `most` times as fast together.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import measure
from bench_serve import BASE, QUICK, Client, in_threads, server
from seal_engine import AdamParams, Datum, Engine, LoraConfig
from tinker_client import service_client  # pyright: ignore[reportMissingImports]

tinker = pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

TENANTS = 4 if QUICK else 32
STEPS = 1 if QUICK else 2
RANKS = (4, 8, 16, 32)
RATE = 1e-3


@contextmanager
def sdk(address: str) -> Iterator[Any]:
    """A client of the SDK."""
    os.environ["TINKER_TELEMETRY"] = "0"
    with service_client(f"http://{address}") as client:
        yield client


def token_ids(tenant: int, length: int) -> list[int]:
    """A sequence of a tenant's own."""
    return [3 + (tenant * 97 + j * 31) % 900 for j in range(length)]


def datum(ids: list[int]) -> Any:
    """What predicts every next token."""
    inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
    return tinker.Datum(model_input=tinker.types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)


def by_engine(length: int) -> Callable[[], list[float]]:
    """A step of each tenant by Engine, which trains them together: their losses."""
    engine = Engine.from_pretrained(BASE)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapters = [
        engine.create_adapter(LoraConfig(r=RANKS[i % 4], lora_alpha=32, target_modules=targets), seed=i)
        for i in range(TENANTS)
    ]
    data = [Datum(a, token_ids(i, length), weights=[1.0] * (length - 1)) for i, a in enumerate(adapters)]
    params = AdamParams(RATE, (0.9, 0.95), 1e-12, 0.0, None)

    def step() -> list[float]:
        losses = [result.loss for result in engine.forward_backward(data)]
        engine.optim_step([(adapter, params) for adapter in adapters])
        return losses

    return step


@pytest.mark.parametrize("length", [40, 200])
def test_tenants_together(benchmark, record, length):
    """A step of one sequence of each tenant: all at once, and each when the one before has its result. In turns."""
    with server() as (address, _, _), sdk(address) as client:
        creating = [client.create_lora_training_client(BASE, RANKS[i % 4], i) for i in range(TENANTS)]
        models = [future.result() for future in creating]
        data = [[datum(token_ids(i, length))] for i in range(TENANTS)]
        step = tinker.AdamParams(learning_rate=RATE)

        def train(tenants: list[int]) -> list[float]:
            futures = [
                (models[i].forward_backward(data[i], "cross_entropy"), models[i].optim_step(step)) for i in tenants
            ]
            return [loss.result().metrics["loss:sum"] for loss, stepped in futures if stepped.result()]

        engine_step = by_engine(length)
        for _ in range(2):
            assert train(list(range(TENANTS))) == pytest.approx(engine_step(), rel=1e-2)  # in bfloat16

        def together() -> None:
            for _ in range(STEPS):
                train(list(range(TENANTS)))

        def one_by_one() -> None:
            for _ in range(STEPS):
                for i in range(TENANTS):
                    train([i])

        at_once, in_line, alone = measure.side_by_side(benchmark, [together, one_by_one, engine_step], rounds=3)
    count = STEPS * TENANTS
    record(
        what=f"steps of one sequence of {length} tokens", tenants=TENANTS, together_ms=1000 * at_once / count,
        one_by_one_ms=1000 * in_line / count, ratio=in_line / at_once, engine_ms=1000 * alone / TENANTS,
        most=in_line / count / (alone / TENANTS), requests_per_s=2 * count / at_once,
    )  # fmt: skip


def test_the_wire_alone(benchmark, record):
    """Requests that do next to nothing: get_info, and a step of AdamW on 4,000 parameters; through HTTP, the SDK, and
    Python. In turns."""
    count = 20 if QUICK else 100
    engine = Engine.from_pretrained(BASE)
    adapter = engine.create_adapter(LoraConfig(r=1, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")))
    adapter.allocate_optimizer_state()
    with server() as (address, _, _), sdk(address) as client:
        by_sdk, by_http = (
            client.create_lora_training_client(BASE, 1, train_mlp=False).result() for _ in range(2)
        )  # fmt: skip
        step = tinker.AdamParams(learning_rate=0.0)
        connection, model_id, numbers = Client(address), by_http.model_id, iter(range(1, 10**9))

        def get_info() -> None:
            assert connection.post("/api/v1/get_info", {"model_id": model_id})[0] == 200

        def http_step() -> None:
            body = {"model_id": model_id, "seq_id": next(numbers), "adam_params": {"learning_rate": 0.0}}
            status, submitted = connection.post("/api/v1/optim_step", body)
            assert status == 200
            status, reply = connection.post("/api/v1/retrieve_future", {"request_id": submitted["request_id"]})
            assert (status, reply["metrics"]["grad_norm"]) == (200, 0.0)

        ways: dict[str, Callable[[], Any]] = {
            "get_info, HTTP": get_info,
            "optim_step, Python": lambda: engine.optim_step([(adapter, AdamParams(0.0))]),
            "optim_step, HTTP": http_step,
            "optim_step, SDK": lambda: by_sdk.optim_step(step).result(),
        }
        seconds = measure.side_by_side(benchmark, list(ways.values()), rounds=3, repeats=count // 3)
        for what, each in zip(ways, seconds, strict=True):
            record(what=what, clients=1, ms=1000 * each, requests_per_s=1 / each)
        clients = 16

        def many(_: int) -> None:
            own = Client(address)
            for _ in range(count // 4):
                assert own.post("/api/v1/get_info", {"model_id": model_id})[0] == 200

        total, _ = in_threads(clients, many)
        record(what="get_info, HTTP", clients=clients, requests_per_s=clients * (count // 4) / total)
