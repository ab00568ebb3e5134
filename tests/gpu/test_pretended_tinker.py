"""Models of the Tinker API on a CUDA device that is pretended: their states come and go between it and the host."""

import asyncio
from concurrent.futures import Future

import pytest
import torch

from gpu.pretended_cuda import PretendedCuda
from gpu.test_pretended_cuda import TEXTS, make_model
from seal_engine import Engine, LoraConfig
from seal_engine.serve.tinker.memory import ModelMemory, ModelState
from seal_engine.training.jobs import AdamParams, Datum
from seal_kernels.dispatch import INTERPRET

pytestmark = [
    pytest.mark.skipif(not INTERPRET, reason="kernels run in Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.xdist_group("pretended CUDA, Tinker"),  # one process has the device
]


class InPlace:
    """Calls what a worker would call between two turns, at once and on this thread, which has the device."""

    def __init__(self, engine):
        self.engine = engine

    def call(self, function):
        future = Future()
        future.set_result(function(self.engine))
        return future


async def train(engine, memory, states):
    """Losses of three steps of all models in turns, and the most bytes of states on the device meanwhile."""
    losses, most = [], 0
    for _ in range(3):
        for state in states:
            async with memory.use(state):
                losses.append(engine.forward_backward([Datum(state.adapter, TEXTS[0])])[0].loss)
                most = max(most, memory.nbytes)
        for state in states:
            async with memory.use(state):
                engine.optim_step([(state.adapter, AdamParams(learning_rate=1e-2))])
    return losses, most


def test_a_state_that_was_on_the_host_goes_on_as_if_it_had_stayed(monkeypatch):
    """Three models with room for one and for all: losses are equal bit for bit. What leaves the device frees all 16
    bytes for each parameter, and the gradient that waits for its step goes with it."""
    outcomes = []
    empty = torch.empty
    # Pinning needs a driver.
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    with PretendedCuda() as device:
        engine = Engine(make_model(1, "cuda"))
        lora = LoraConfig(r=4, target_modules="all-linear")
        for room in (1, 3):
            states = [ModelState(engine.create_adapter(lora, seed=i)) for i in range(3)]
            size = states[0].nbytes
            memory = ModelMemory(InPlace(engine), room * size)  # type: ignore[arg-type]
            losses, most = asyncio.run(train(engine, memory, states))
            outcomes.append(losses)
            assert most == room * size
            assert (memory.num_moves > 10) == (room == 1)
            before = device.bytes_in_use
            states[2].move_out()
            assert before - device.bytes_in_use == size
    assert outcomes[0] == outcomes[1]
