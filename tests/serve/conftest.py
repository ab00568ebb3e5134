"""One engine for all servers of a module, and adapters that change what it says."""

import asyncio
import gc
import sys
import warnings

import pytest
import torch
from serving import running

from seal_engine import Engine, LoraConfig
from seal_engine.tiny import MODEL

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second one only waits for the first in a model of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def collect():
    """What the Tinker SDK leaves open ends here, where that is no error, and not in another module's test.

    Its one background thread would go on trying to reach servers that are gone, with random delays: hypothesis takes
    numbers that are drawn meanwhile for its strategies' own.
    """
    yield
    sdk = sys.modules.get("tinker.lib.internal_client_holder")
    loop = sdk and sdk._internal_client_holder_thread_singleton.loop_if_started()
    if loop:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def engine():
    return Engine.from_pretrained(MODEL, device="cpu")


@pytest.fixture(scope="session")
def make_adapter(engine):
    """seed -> an adapter whose B is random, so that it changes the logits."""

    def make(seed, rank=4):
        adapter = engine.create_adapter(LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear"), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, _, b in adapter.projections():
            b.normal_(0, 0.1, generator=generator)
        return adapter

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter, tmp_path_factory):
    """name -> (adapter, its directory)."""
    made = {}
    for seed, name in enumerate(("ann", "bob")):
        directory = tmp_path_factory.mktemp("adapters") / name
        adapter = make_adapter(seed, 4 + seed)
        adapter.save(directory)
        made[name] = adapter, directory
    return made


@pytest.fixture(scope="module")
def server(engine, adapters):
    """Serves the miniature and two adapters, with a chat template."""
    names = ["--adapter", *(f"{name}={directory}" for name, (_, directory) in adapters.items())]
    allowed = ["--allow-adapters-from", str(next(iter(adapters.values()))[1].parents[1])]
    with running(engine, *names, *allowed, chat_template=TEMPLATE) as running_server:
        yield running_server
