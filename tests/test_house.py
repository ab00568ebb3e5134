"""The rules of the house: imports run one way, and nothing heavy is imported where it is not needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms and top-level modules from the bottom up: each imports those above it in this list, never those below, and rooms
# of one line do not import each other.
ROOMS = [
    {"errors"},
    {"types"},
    {"files", "progress"},
    {"environment", "svg"},
    {"model"},
    {"plan"},
    {"training.jobs", "sampling.requests"},  # what callers hand over: types that cross rooms
    {"inputs"},
    {"training", "sampling"},
    {"engine"},
    {"forecast"},
    {"api"},
    {"__init__"},
    {"loop"},
    {"domains", "cluster"},
    {"serve"},
    {"tiny", "real"},
    {"runs"},
    {"report"},
    {"cli"},
    {"__main__"},
]
MODULES_OF_THEIR_OWN = {"training.jobs", "sampling.requests"}
MAX_LINES = 450


def imported(file: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports, without the package's name: "training.jobs"."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == package or node.module.startswith(package + "."):
                inside = node.module.removeprefix(package).lstrip(".")
                names |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix(package + ".") for a in node.names if a.name.startswith(package + ".")}
    return names


def room(name: str) -> str:
    """The room of a module or of a name in one: "training.trainer.Trainer" is in training."""
    parts = name.split(".")
    module = ".".join(parts[:2])
    return module if module in MODULES_OF_THEIR_OWN else parts[0]


def test_imports_run_one_way():
    level = {name: i for i, names in enumerate(ROOMS) for name in names}
    package = ROOT / "seal_engine"
    rooms = {}
    for file in sorted(package.rglob("*.py")):
        rooms[file] = room(".".join(file.relative_to(package).with_suffix("").parts))
    assert set(rooms.values()) == set(level), "every module has its place in ROOMS"
    for file, own in rooms.items():
        for name in imported(file, "seal_engine"):
            other = room(name) if room(name) in level else "__init__"  # from seal_engine import Engine
            inside_a_room = other == own and file.parent != package
            assert inside_a_room or level[other] < level[own], f"{file} imports {name}"


@pytest.mark.parametrize("folder", ["seal_engine", "kernels"])
def test_no_file_has_two_jobs(folder):
    lengths = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_kernels_import_nothing_of_the_engine():
    for file in (ROOT / "kernels/seal_kernels").glob("*.py"):
        assert not imported(file, "seal_engine"), file


@pytest.mark.parametrize("module", ["transformers", "peft", "triton", "fastapi", "zmq", "ray"])
def test_the_cpu_path_does_not_import(module):
    """Importing the engine and the command line on a machine without a GPU brings in neither Hugging Face's stack nor
    triton nor what the extras `serve` and `ray` install."""
    if module == "triton":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device, so triton is imported")
    code = "import seal_engine.api, sys; from seal_engine.cli import bench, engine, main, run, serve; "
    code += f"sys.exit({module!r} in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
