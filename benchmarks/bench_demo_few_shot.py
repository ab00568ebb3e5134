"""The few-shot demo's whole loop, timed and recorded, and its control: see bench_demo."""

import pytest

import measure
from bench_demo import run_demo

pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="the miniature is for machines without a GPU")


@pytest.mark.parametrize("control", [False, True], ids=["rewards", "shuffled rewards"])
def test_demo(benchmark, record, request, tmp_path, control):
    run_demo("few-shot", control, benchmark, record, request.config.getoption("--record"), tmp_path / "run")
