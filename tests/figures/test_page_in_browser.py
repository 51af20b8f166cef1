"""`report.html` in a headless Chromium: it is drawn without errors, and the controls of the graph of edges work."""

import json

import pytest
import torch
from helpers.chromium import open_browser, open_page, until
from helpers.results import EVIL, write_comparison, write_prompts

from circuit_breaking.figures.browser.page import write_page
from circuit_breaking.graph import EdgeGraph, describe
from circuit_breaking.runs.mask_record import write_edges
from circuit_breaking.runs.ranking_record import RANKING, RankingRecord
from circuit_breaking.runs.tensors import write_tensors

SMOLLM2 = EdgeGraph(30, 9)  # 44,371 edges
SPLIT = EdgeGraph(3, 2, split_qkv=True)
PARALLEL = EdgeGraph(3, 2, parallel=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


def write_ranking(run, graph, cut=200):
    order = torch.randperm(len(graph), generator=torch.manual_seed(0))
    scores = torch.linspace(1, 0, len(graph)) ** 8
    record = RankingRecord(model="m", graph=describe(graph), method="ranking")
    write_tensors(run / RANKING, {"order": order, "scores": scores}, record.to_json())
    write_edges(run, [graph.edges[at] for at in order[:cut].sort().values.tolist()])
    return [graph.edges[at] for at in order.tolist()]


def drawn(browser, count=None):
    """How many edges are drawn, when drawing has ended; with `count`, wait for that number."""
    ready = "const one = document.querySelector('.curves'); return one.dataset.done === 'yes'"
    until(browser, ready if count is None else f"{ready} && one.dataset.drawn === '{count}'")
    return int(browser.execute_script("return document.querySelector('.curves').dataset.drawn"))


def give(browser, selector, value, event="input"):
    script = (
        "const one = document.querySelector(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event(arguments[2], {bubbles: true}))"
    )
    browser.execute_script(script, selector, value, event)


def ink(browser):
    """Pixels of both canvases of edges that are not empty."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.canvas canvas')].slice(0, 2).map((one) => one.getContext('2d')"
        ".getImageData(0, 0, one.width, one.height).data.filter((v, at) => at % 4 === 3 && v).length)"
    )


SCROLLED = (
    "return [...document.querySelectorAll('[data-plot]')].filter((one) => { const { legend } = one._fullLayout;"
    " return legend && legend._height > legend._effHeight + 1; }).length"
)


def test_no_name_of_a_legend_is_hidden(tmp_path, browser):
    write_comparison(tmp_path)
    assert open_page(browser, write_page(tmp_path)) == []
    try:
        for width in (1280, 420, 1280):
            browser.set_window_size(width, 900)
            until(browser, f"return !({SCROLLED.removeprefix('return ')})")
    finally:
        browser.set_window_size(1280, 900)


def test_a_comparison_is_drawn_without_a_complaint(tmp_path, browser):
    write_comparison(tmp_path)
    assert open_page(browser, write_page(tmp_path)) == []
    plots = "return [...document.querySelectorAll('.plot')].map((one) => one.querySelectorAll('.trace').length)"
    assert min(browser.execute_script(plots)) > 0
    buttons = browser.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
    )
    assert not [one for one in buttons if "hare" in one or "loud" in one]  # nothing is sent anywhere
    for width in (1280, 420):
        browser.set_window_size(width, 900)
        until(browser, "return document.documentElement.scrollWidth <= window.innerWidth")  # plots follow
    browser.set_window_size(1280, 900)


def test_the_slider_the_search_and_the_choices_change_what_is_drawn(tmp_path, browser):
    names = write_ranking(tmp_path, SMOLLM2)
    assert open_page(browser, write_page(tmp_path)) == []
    assert drawn(browser) == 200  # as many as the run cuts
    few = ink(browser)
    give(browser, "input[type=range]", 1000)
    assert drawn(browser, len(SMOLLM2)) == 44_371
    many = ink(browser)
    assert few[1] < many[1] and few[0] == 0 < many[0]
    give(browser, "input[type=range]", 0)
    assert drawn(browser, 0) == 0 and ink(browser) == [0, 0]
    give(browser, "input[type=number]", 500)
    assert drawn(browser, 500) == 500
    touching = [one for one in names[:500] if {part[1:].split(".")[0] for part in one.split("->")} & {"7"}]
    give(browser, ".controls label:nth-of-type(3) select", 7, "change")
    assert drawn(browser, len(touching)) == len(touching)
    rows = "return [...document.querySelectorAll('.top tbody th')].map((row) => row.textContent)"
    until(browser, f"{rows}.length === {len(touching[:100])}")
    assert browser.execute_script(rows) == touching[:100]
    give(browser, ".controls label:nth-of-type(3) select", "", "change")
    node = names[0].split("->")[0]
    give(browser, "input[type=search]", node)
    drawn(browser, 500)
    mine = [one for one in names[:500] if node in (one.split("->")[0], ".".join(one.split("->")[1].split(".")[:2]))]
    until(browser, f"{rows}.length === {len(mine)}")
    assert browser.execute_script(rows) == mine


@pytest.mark.parametrize("graph", [SPLIT, PARALLEL, SMOLLM2], ids=["split", "parallel", "SmolLM2"])
def test_edges_have_the_names_that_the_graph_gives_them(tmp_path, browser, graph):
    names = write_ranking(tmp_path, graph, cut=min(100, len(graph)))
    open_page(browser, write_page(tmp_path))
    rows = "return [...document.querySelectorAll('.top tbody th')].map((row) => row.textContent)"
    until(browser, f"{rows}.length === {min(100, len(graph))}")
    assert browser.execute_script(rows) == names[:100]


def test_an_edge_under_the_pointer_says_its_effect(tmp_path, browser):
    write_prompts(tmp_path)
    open_page(browser, write_page(tmp_path))
    until(browser, "return document.querySelector('.top tbody tr')")
    tip = "const one = document.querySelector('.tip'); return one.style.display === 'block' && one.textContent"
    says = "a0.0->m1importance: 0.5000number 1 of this list"
    browser.execute_script("document.querySelector('.top tbody tr').dispatchEvent(new MouseEvent('mouseenter'))")
    assert browser.execute_script(tip) == says
    x, y = (float(browser.execute_script(f"return document.querySelector('.tip').dataset.{axis}")) for axis in "xy")
    for away, said in ((0, says), (45, False)):  # pixels below the middle of the edge
        browser.execute_script(
            "const one = document.querySelectorAll('.canvas canvas')[2], at = one.getBoundingClientRect();"
            "one.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: at.left + arguments[0],"
            " clientY: at.top + arguments[1]}))",
            x,
            y + away,
        )
        until(browser, f"{tip.replace('return', 'return (')}) === {json.dumps(said)}")


def test_text_from_data_stays_text(tmp_path, browser):
    write_prompts(tmp_path, EVIL, EVIL)
    assert open_page(browser, write_page(tmp_path)) == []
    assert browser.title == tmp_path.name and browser.execute_script("return document.images.length") == 0
    assert "<img src=x onerror=" in browser.execute_script("return document.body.textContent")


@pytest.mark.slow
def test_the_page_answers_while_all_edges_are_drawn(tmp_path, browser):
    """Frames while the number of edges jumps from 200 to all 44,371: `pytest -m slow -s` prints their milliseconds."""
    write_ranking(tmp_path, SMOLLM2)
    open_page(browser, write_page(tmp_path))
    browser.set_script_timeout(120)
    whole, median, longest = browser.execute_async_script(
        """
        const done = arguments[0], gaps = [], start = performance.now();
        let last = start;
        const slider = document.querySelector("input[type=range]");
        slider.value = 1000;
        slider.dispatchEvent(new Event("input"));
        const frame = () => {
            const now = performance.now();
            gaps.push(now - last);
            last = now;
            if (document.querySelector(".curves").dataset.done !== "yes") return requestAnimationFrame(frame);
            gaps.sort((one, other) => one - other);
            done([now - start, gaps[gaps.length >> 1], gaps.at(-1)]);
        };
        requestAnimationFrame(frame);
        """
    )
    print(f"{len(SMOLLM2):,} edges in {whole:.0f} ms; a frame takes {median:.0f} ms, the longest {longest:.0f} ms")
    assert drawn(browser) == 44_371
    assert whole < 20_000 and median < 250  # also on a machine that runs other jobs
