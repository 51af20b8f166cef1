"""The documentation's links, paths and lengths."""

import re

import pytest
from helpers.markdown import PAGES, anchors, links, name_of, prose

from circuit_breaking.runs.files import ROOT

# what a run writes, and so is not in the repository
RESULTS = re.compile(r"^(data/(toxicity|ioi|mnist|mask_learning|sweeps|benchmarks)|means|finetuned|masks|text)/")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists() and path.is_relative_to(ROOT), f"{name_of(page)}: {link}: there is no {path}"
        if anchor:
            assert anchor in anchors(path), f"{name_of(page)}: {link}: {path.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_is_there(page):
    for name in re.findall(r"`([\w./]+\.(?:py|ipynb|sbatch|md|toml))`", prose(page)):
        if "/" in name and not RESULTS.match(name):
            roots = (ROOT, page.parent, ROOT / "circuit_breaking")
            assert any((root / name).exists() for root in roots), f"{name_of(page)} names {name}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_fit_a_window(page):
    long = [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > 120 and line[0] != "|"]
    assert not long


def test_every_page_is_in_the_index():
    index = set(links(ROOT / "docs" / "README.md"))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= index
