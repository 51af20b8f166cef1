"""No pickle is read or written: nothing in the tree asks for it."""

import ast

import pytest

from circuit_breaking.files import ROOT

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {("torch", "load"), ("torch", "save"), ("np", "save"), ("numpy", "load"), ("pd", "read_pickle")}
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {part for part in path.relative_to(ROOT).parts if part.startswith(".")} and "site-packages" not in path.parts
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_pickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.partition(".")[0] for name in names} & MODULES, f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (of, node.func.attr) not in CALLS, f"line {node.lineno}"
            assert not any(
                keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False
                for keyword in node.keywords
            )


def test_there_are_files_to_look_at():
    assert len(FILES) > 100
