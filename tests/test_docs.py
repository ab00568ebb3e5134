"""docs/architecture.md names only functions, classes and files that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/architecture.md").read_text())))


@cache
def definitions() -> set[str]:
    """Every function, class, method ("Class.method") and module-level name of the two packages."""
    names = set()
    for folder in ("seal_engine", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, FUNCTIONS | ast.ClassDef):
                    names.add(node.name)
                    members = node.body if isinstance(node, ast.ClassDef) else []
                    names |= {f"{node.name}.{m.name}" for m in members if isinstance(m, FUNCTIONS)}
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("span", SPANS)
def test_what_the_architecture_page_names_exists(span):
    is_path = any((folder / span.replace("NAME", "lora")).exists() for folder in (ROOT, ROOT / "seal_engine"))
    assert is_path or span in definitions()


def test_the_page_names_something():
    assert len(SPANS) > 50
