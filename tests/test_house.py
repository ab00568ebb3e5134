"""The rules of the house: imports run one way, and nothing heavy is imported where it is not needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import modules of its own layer's left only; modules of one layer never import each other, but for
# what is listed as (importer, imported).
LAYERS = [
    {"types"},
    {"files"},
    {"config", "chat_template", "settings", "ledger"},
    {"tokenizer", "adapters", "devices"},
    {"kv_cache", "requests"},
    {"model", "jobs", "plan"},
    {"checkpoint", "inputs"},
    {"decode_graph", "loop"},
    {"train", "sample"},
    {"engine"},
    {"__init__", "restem"},
    {"domains"},
    {"tiny"},
    {"runs"},
    {"report_data", "report_html"},
    {"report_plots"},
    {"report"},
    {"verbs_bench", "verbs_engine", "verbs_run"},
    {"cli"},
    {"__main__"},
]


def imported(file: Path, package: str) -> set[str]:
    """First-level modules of `package` that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == package:
                names |= {alias.name for alias in node.names}
            elif node.module.startswith(package + "."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(package + ".")}
    return names


def test_imports_run_one_way():
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    package = ROOT / "seal_engine"
    files = sorted(package.rglob("*.py"))
    own = {file: file.relative_to(package).with_suffix("").parts[0] for file in files}  # a folder is one module
    assert set(own.values()) == set(level), "every module has its place in LAYERS"
    for file, name in own.items():
        for module in imported(file, "seal_engine") - ({name} if file.parent != package else set()):
            assert level[module] < level[name], f"{file} imports {module}"


def test_kernels_import_nothing_of_the_engine():
    for file in (ROOT / "kernels/seal_kernels").glob("*.py"):
        assert not imported(file, "seal_engine"), file


@pytest.mark.parametrize("module", ["transformers", "peft", "triton"])
def test_the_cpu_path_does_not_import(module):
    """Importing the engine on a machine without a GPU brings in neither Hugging Face's stack nor triton."""
    if module == "triton":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device, so triton is imported")
    code = f"import seal_engine, sys; sys.exit({module!r} in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
