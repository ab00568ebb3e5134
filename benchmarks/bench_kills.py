"""The demo on one worker, and on three while workers and the driver are killed: the same table, the same ledger.

Ten random moments are a worker's end (SIGKILL), two are the driver's, after which the run is resumed. Moments are drawn
from the time line of the first run, so that they are everywhere in it, however fast the second one is.
"""

import random
from itertools import accumulate
from time import perf_counter, sleep

import pytest

import measure
from ray_processes import begin, kill_one, num_steps, snapshot, wait_for  # pyright: ignore[reportMissingImports]
from seal_engine import runs
from seal_engine.loop.ledger import Ledger

RUN = "run", "miniature", "--seeds=0,1,2", "--deterministic"  # the demo
WORKERS, WORKER_KILLS, DRIVER_KILLS = 3, 10, 2
STEP_SECONDS = 600  # no step takes so long
pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="bits are compared on CPUs")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'seal-engine[ray]'")


def moments(directory, draw):
    """Moments of a run, in order: (steps recorded before, seconds after the last of them, whose end it is)."""
    with Ledger.read(directory) as ledger:
        ends = list(accumulate(step[2] for step in ledger.steps()))
    whose = ["worker"] * WORKER_KILLS + ["driver"] * DRIVER_KILLS
    draw.shuffle(whose)
    for time, who in zip(sorted(draw.uniform(0, ends[-1]) for _ in whose), whose, strict=True):
        before = [end for end in ends if end <= time]
        yield len(before), time - max(before, default=0.0), who


def run_with_kills(directory, log, kills, draw):
    """The run to its end, whose driver is begun again whenever it is killed; returns what was killed when. log: a file
    that takes what the drivers say."""
    driver, done = begin(*RUN, f"--workers={WORKERS}", f"--out={directory}", stdout=log), []
    for before, seconds, who in kills:
        wait_for(lambda n=before: num_steps(directory) >= n, driver, STEP_SECONDS)
        sleep(seconds / WORKERS)
        if who == "worker":
            wait_for(lambda parent=driver: kill_one(parent.pid, draw), driver)
        assert driver.poll() is None, f"the run ended after {len(done)} kills"
        if who == "driver":
            driver.kill()
            driver.wait()
            driver = begin("resume", str(directory), stdout=log)
        done.append(f"{who} after {num_steps(directory)} steps")
    assert driver.wait() == 0
    return done


def table(directory):
    with Ledger.read(directory) as ledger:
        return [(row.name, *row.accuracies) for row in runs.rows(ledger)]


def test_kills(benchmark, record, tmp_path):
    draw, one, three, log = random.Random(0), tmp_path / "one", tmp_path / "three", tmp_path / "log"

    def measured():
        start = perf_counter()
        assert begin(*RUN, "--quiet", "--workers=1", f"--out={one}").wait() == 0
        between = perf_counter()
        with log.open("w") as file:
            killed = run_with_kills(three, file, list(moments(one, draw)), draw)
        record(workers=1, seconds=between - start)
        record(
            workers=WORKERS, seconds=perf_counter() - between, worker_kills=WORKER_KILLS, driver_kills=DRIVER_KILLS,
            lost_at_work=log.read_text().count("is lost, and is started again"), killed=killed, steps=num_steps(three),
            trials=len(snapshot(three)["trials"]), same_table=table(one) == table(three),
            same_ledger=snapshot(one) == snapshot(three),
        )  # fmt: skip
        assert table(one) == table(three)
        assert snapshot(one) == snapshot(three)

    benchmark.pedantic(measured, rounds=1, iterations=1)
