"""What docs/tinker.md shows works as pasted, with another port."""

import argparse
import re
from pathlib import Path

import pytest

pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

from tinker_cases import SDK_CONNECTIONS, tinker_server

from seal_engine.cli.serve import serve_arguments
from seal_engine.serve.setup import tinker_settings
from seal_engine.types import InputError

pytestmark = SDK_CONNECTIONS
PAGE = (Path(__file__).parents[2] / "docs/tinker.md").read_text()


def test_the_python_example(engine, tmp_path, capsys):
    """The loss falls over ten steps, and the sampler says what was taught."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    with tinker_server(engine, tmp_path, "--served-model-name", "seal_engine/tiny/model") as server:
        exec(code.replace("http://localhost:8000", server.url), {})
    *steps, tokens = capsys.readouterr().out.splitlines()
    losses = [float(step.split()[0]) for step in steps]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert re.fullmatch(r"\[[\d, ]+\]", tokens)


def test_every_flag_is_accepted():
    """Of those that the page names."""
    parser = argparse.ArgumentParser()
    serve_arguments(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert len(named) > 5
    assert named <= known


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--tinker-alpha", "nan"),
        ("--tinker-max-models", "0"),
        ("--tinker-model-bytes", "-1"),
        ("--tinker-sampler-bytes", "-1"),
        ("--tinker-session-seconds", "0"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_flag(flag, value):
    """Before anything is served."""
    parser = argparse.ArgumentParser()
    serve_arguments(parser)
    with pytest.raises(InputError, match=rf"{flag}: found {value}.*; accepted: a"):
        tinker_settings(parser.parse_args(["--model", "x", flag, value]))
