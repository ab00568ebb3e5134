"""docs/scaling.md's commands on two Ray nodes of this machine, with a token: one node is removed, and one joins."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from ray_processes import begin, descendants, num_steps, snapshot, wait_for

SMALL = ["--rounds=1", "--contexts=6", "--self-edits=3", "--held-out-contexts=6", "--passage-copies=0", "--seeds=0,1,2"]
RUN = ["run", "miniature", "--deterministic", *SMALL]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'seal-engine[ray]'")
pytestmark = pytest.mark.xdist_group("ray")


def kill_all(process):
    """SIGKILL for a process and all below it, as if its machine were switched off."""
    for pid in [*descendants(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """start(*arguments) begins a Ray node of one CPU; all end with the test. Others' Rays are not touched: `ray stop`
    would end them, too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)  # what "auto" is
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    begun = []

    def start(*arguments):
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--num-cpus=1", "--block"]
        log = tmp_path / f"node-{len(begun)}"
        with log.open("w") as file:
            begun.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        wait_for(lambda: "Ray runtime started" in log.read_text(), begun[-1])
        assert begun[-1].poll() is None, log.read_text()
        return begun[-1]

    start("--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false")
    yield lambda: start(f"--address={address}")
    for process in reversed(begun):
        kill_all(process)


def test_a_node_is_removed_and_another_joins(tmp_path, cluster):
    """One worker on each of two nodes. With one node gone the run goes on, and a worker starts on a node that joins."""
    here, log = begin(*RUN, "--quiet", f"--out={tmp_path / 'here'}"), tmp_path / "log"
    node = cluster()
    with log.open("w") as file:
        there = begin(*RUN, f"--out={tmp_path / 'there'}", "--ray-address=auto", stdout=file)
    try:
        wait_for(lambda: num_steps(tmp_path / "there") >= 2, there)
        kill_all(node)
        wait_for(lambda: "is lost" in log.read_text(), there)
        cluster()
        wait_for(lambda: "is ready again" in log.read_text(), there)
        assert there.poll() is None, "the run must go on for long enough"
        assert (here.wait(120), there.wait(120)) == (0, 0)
    finally:
        here.kill()
        there.kill()
    assert log.read_text().count("is lost, and is started again") == 1
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")


def test_an_address_where_no_ray_is_fails_at_once(tmp_path):
    """One line and exit status 2, where Ray would try for two minutes: nothing listens at port 1."""
    with (tmp_path / "errors").open("w") as file:
        run = begin(*RUN, f"--out={tmp_path / 'run'}", "--ray-address=127.0.0.1:1", stderr=file)
        assert run.wait(60) == 2
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert "ray_address: found 127.0.0.1:1: [Errno 111] Connection refused; accepted: a Ray that runs" in line
