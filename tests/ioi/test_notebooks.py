"""The notebooks of `ioi/` run from top to bottom on the shipped model."""

import sys
from contextlib import chdir

import nbformat
import pytest
from nbclient import NotebookClient
from test_ioi_scripts import QUICK, data  # noqa: F401 (data is a fixture)

from circuit_breaking.models.load import TINY
from circuit_breaking.runs.files import ROOT

pytestmark = [
    pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in tiny_gpt2"),
    pytest.mark.usefixtures("coarse_importance", "blank_pictures", "short_choice"),
]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("make_ioi_datasets", {"train": 40, "test": 20}),
        ("train_ioi_mask", {**QUICK, "max_edges": 4}),
        (
            "alternative_masks",
            {
                **QUICK,
                "max_edges": 4,
                "masks": 2,
                "num_measured": 20,
                "prune_rounds": 3,
                "shrink": 0.6,
                "faithful": 0.4,
            },
        ),
    ],
)
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_notebooks_run_from_top_to_bottom(data, tmp_path, name, changes, kernel):  # noqa: F811
    """In this process, or as Jupyter runs them: each in a new process, with pictures as they are."""
    path = ROOT / "ioi" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    committed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in committed) or name == "make_ioi_datasets"
    assert path.stat().st_size < 1_000_000 and not any(output.output_type == "error" for output in committed)
    (settings,) = [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", [])]
    if name != "make_ioi_datasets":
        changes = {**changes, "train": data / "all_train.jsonl", "test": data / "all_test.jsonl"}
        changes["ordinary"] = str(data / "plain.txt")
    given = ", ".join(f"{key}=Path({str(value)!r})" if hasattr(value, "parts") else f"{key}={value!r}"
                      for key, value in {**changes, "out": tmp_path}.items())  # fmt: skip
    settings.source += (
        f"\nfrom dataclasses import replace\nfrom pathlib import Path\nsettings = replace(settings, {given})"
    )
    elsewhere = tmp_path / "elsewhere"  # a notebook finds its scripts from any folder
    elsewhere.mkdir()
    if kernel:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(elsewhere)}}).execute()
    else:
        execute_here(notebook, elsewhere)
    assert len(list(tmp_path.iterdir())) > 1


def execute_here(notebook, folder):
    """Execute the cells one after another, from a folder."""
    before, path, names = set(sys.modules), list(sys.path), {"__name__": "__main__"}
    try:
        with chdir(folder):
            for number, cell in enumerate(notebook.cells):
                if cell.cell_type == "code":
                    exec(compile(cell.source, f"cell {number}", "exec"), names)
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:  # the notebook's scripts have names as short as those of toxicity/
            if "." not in name and str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "ioi")):
                del sys.modules[name]
