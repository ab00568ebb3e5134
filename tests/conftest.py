"""Sets torch's threads before torch is loaded, and imports triton before the kernels do.

The latter is for the compile gates, which find compilable kernels in this process then.
"""

import importlib.util
import os
from datetime import timedelta

import pytest

import seal_engine.cli  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers, and the processes that tests start, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if importlib.util.find_spec("triton"):
    import triton  # noqa: F401

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # Against what never ends; its own 200 ms a shared machine can miss in any test.
    settings.register_profile("shared", deadline=timedelta(seconds=20))
    settings.load_profile("shared")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name -> directory of that model, made once.

    Its logits are mild. Sharper ones make float32 itself differ from float64 by 1e-5 after one AdamW step, which
    moves a parameter by the whole learning rate even where its gradient is rounding noise.
    """
    import oracle  # imports Transformers, which kernel tests do not need

    made = {}

    def make(name):
        if name not in made:
            made[name] = oracle.save(oracle.make_model(name, initializer_range=0.06), tmp_path_factory.mktemp(name))
        return made[name]

    return make
