"""The examples run, and show what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_inner_loop(capsys):
    load("01_inner_loop")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert any(line.startswith(("4 of 5", "5 of 5")) for line in lines)


def test_one_round_teaches_the_policy():
    before, after = load("02_seal_round")["main"]()
    assert after > before + 0.15


def test_200_adapters_do_not_depend_on_company(capsys):
    assert load("03_many_adapters")["main"]()
    assert "the same, bit for bit" in capsys.readouterr().out


def test_a_domain_of_ones_own(tmp_path):
    main = load("04_own_domain")["main"]
    table = main(tmp_path / "run")
    rates = {line[:30].strip(): float(line[30:].split()[0]) for line in table.splitlines()[1:]}
    assert rates["template"] == 100
    assert rates["no adapter"] < 50
    assert main(tmp_path / "run") == table


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_says_how_to_run_it(file):
    assert f"Run it with: python examples/{file.name}" in file.read_text()
