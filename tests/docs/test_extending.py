"""The examples of docs/extending.md, taken from the page and run: each is short, and does what the page says."""

import re

import pytest
import torch
from helpers.markdown import blocks
from helpers.models import spread

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.models.families import FAMILIES
from circuit_breaking.runs.files import ROOT
from circuit_breaking.training.baselines import METHODS as BASELINES
from circuit_breaking.training.methods import METHODS as MASK_METHODS

pytestmark = pytest.mark.usefixtures("short_choice")
PAGE = ROOT / "docs" / "extending.md"
SECTION = r"^## {}\n(.*?)(?=^## |\Z)"


def run(heading: str) -> dict:
    """Run the blocks of Python in one section of the page; the names that they leave."""
    text = re.search(SECTION.format(heading), PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)[1]
    found = [block for block in blocks(PAGE, "python") if block in text]
    assert found and all(len(block.strip().splitlines()) <= 40 for block in found)
    torch.manual_seed(0)
    names: dict = {}
    for number, block in enumerate(found):
        exec(compile(block, f"docs/extending.md, {heading}, block {number}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def registries():
    """What an example registers is gone after its test."""
    before = [(registry, dict(registry)) for registry in (FAMILIES, MASK_METHODS, BASELINES)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def test_family():
    names = run("A model family")
    assert max(names["whole"], names["cut"]) < 1e-4
    hf, tokens = spread(names["hf"]), names["tokens"]
    for split in (False, True):
        model = load_model(hf, split, device="cpu")
        assert (model(tokens) - hf(tokens).logits).abs().max() < 1e-4
        mask = torch.rand(len(model.graph), generator=torch.manual_seed(0))
        torch.testing.assert_close(
            model(tokens, mask=mask), ReferenceModel(hf, split)(tokens, mask), atol=5e-5, rtol=1e-5
        )


def test_task():
    names = run("A task")
    assert names["task"].get_test_loss(names["model"]) > names["before"]
    assert 0 < names["model"].mask.n_cut() <= 5
    batch = names["task"].draw(8)
    parts = [batch[:3], batch[3:]]
    weights = [names["task"].predictions(part) / names["task"].predictions(batch) for part in parts]
    losses = [names["task"].loss(names["model"], part) for part in parts]
    whole = names["task"].loss(names["model"], batch)
    torch.testing.assert_close(sum(w * loss for w, loss in zip(weights, losses, strict=True)), whole)


def test_mask_method():
    names = run("A mask method")
    rows = names["result"].history
    assert [row["n_cut"] for row in rows if row["phase"] == "greedy"] == list(range(1, 13))
    assert 0 < len(names["result"].edges) <= 12 and len(rows) == 22


def test_baseline():
    names = run("A baseline")
    best = names["result"].best
    assert best["step"] > 0 and best["toxic"] > 1.0 and best["ordinary"] < 1.0  # 0.76 and 0.92 before
