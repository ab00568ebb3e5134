"""What docs/serve.md shows works as pasted, with another port."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import running

from seal_engine.cli.serve import serve_arguments

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serve.md").read_text()


@pytest.fixture(scope="module")
def pasted(engine):
    with running(engine, "--seal-port", "0", "--seed", "0", "--served-model-name", "seal_engine/tiny/model") as server:
        yield server


def test_curl(pasted):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    command = re.search(r"^(curl .*?)\n```", PAGE, re.DOTALL | re.MULTILINE)[1]
    command = command.replace("localhost:8000", pasted.url.removeprefix("http://")).replace("\\\n", " ")
    done = subprocess.run([*shlex.split(command), "-s"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"]


def test_the_openai_client(pasted, capsys):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace("http://localhost:8000", pasted.url)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_driver(pasted):
    command = re.search(r"examples/(seal_driver\.py) --port 5555 --drivers (\d+)", PAGE)
    example = runpy.run_path(str(ROOT / "examples" / command[1]))
    example["PASSAGES"].clear()
    assert example["main"](pasted.seal.port, int(command[2])) == []


def test_every_flag_is_accepted():
    """Of those that the page names."""
    import argparse

    parser = argparse.ArgumentParser()
    serve_arguments(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    named = set(re.findall(r"`(--[a-z_-]+)", PAGE)) - {"--vllm_api_url"}
    assert len(named) > 15
    assert named <= known
