"""Engines of the sampling tests."""

import pytest
import torch

from seal_engine import Engine


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second one only waits for the first in models of this size, for long where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_pretrained(checkpoint("llama"), device="cpu")


@pytest.fixture(scope="module")
def exact(checkpoint):
    """Deterministic, its last layer with a window of 9."""
    return Engine.from_pretrained(checkpoint("qwen3-biases-window"), device="cpu", deterministic=True)
