"""The rooms of the package: imports run downwards only, and importing the package loads no large library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from circuit_breaking.runs.files import ROOT

PACKAGE = ROOT / "circuit_breaking"
LEVELS = [  # from the ground up; rooms of one level do not import each other
    {"errors"}, {"graph"}, {"runs"}, {"models"}, {"engine"}, {"ablation"}, {"tasks"}, {"training"}, {"evaluation"},
    {"figures"}, {"toxicity", "ioi", "mnist"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FACES = {"__init__", "masks", "means", "ablated"}  # public names alone, which come from any room


def room_of(module: str) -> str:
    """`"engine"` for `circuit_breaking.engine.reads`."""
    return module.split(".")[1] if "." in module else "__init__"


def arrows() -> list[tuple[str, str]]:
    """(importing module, imported module) for every import of the package in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "circuit_breaking":
                found.append((module, node.module))
            elif isinstance(node, ast.Import):
                found += [(module, name.name) for name in node.names if name.name.startswith("circuit_breaking")]
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
    return found


def test_every_room_has_its_level():
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert rooms - FACES == set(LEVEL)


def test_imports_run_downwards():
    wrong = []
    for importer, imported in arrows():
        above, below = room_of(importer), room_of(imported)
        if above in FACES or below == "__init__":
            continue
        if below in FACES or (above != below and LEVEL[below] >= LEVEL[above]):
            wrong.append(f"{importer} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other():
    below: dict[str, set[str]] = {}
    for importer, imported in arrows():
        below.setdefault(importer, set()).add(imported)
    for module, imported in below.items():
        seen, queue = set(), set(imported)
        while queue:
            one = queue.pop()
            seen.add(one)
            queue |= below.get(one, set()) - seen
        assert module not in seen or module in ("circuit_breaking",), f"{module} imports itself by way of others"


def test_few_files_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize(
    ("module", "large"),
    [("circuit_breaking", ("torch", "transformers", "tyro")), ("circuit_breaking.graph", ("transformers", "tyro"))],
)
def test_importing_the_package_loads_no_large_library(module, large):
    code = f"import sys, {module}; print([name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_found():
    import circuit_breaking
    from circuit_breaking import masks, models, tasks, training

    assert all(getattr(circuit_breaking, name) is not None for name in circuit_breaking.__all__)
    assert models.load_model is circuit_breaking.load_model and training.train_mask is circuit_breaking.train_mask
    assert masks.save_mask is circuit_breaking.save_mask and tasks.TextTask.__mro__[1] is tasks.Task
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        circuit_breaking.nothing  # noqa: B018


def test_no_file_is_long():
    long = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts and _lines(path) > 350]
    assert not long


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
