"""Fixtures of all tests, and the environment that they run in."""

import gc
import os
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for the hub; transformers reads this when it is imported
if "TEST_GPU" not in os.environ:  # `make test-gpu`: all other tests are of the CPU, also where there is a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

gc.disable()  # until everything is imported, which makes many objects and no garbage

import pytest
import torch
from helpers.models import SMALL, small
from helpers.tasks import SHORT_CHOICE

torch.set_num_threads(1)  # small models: more threads only wait for each other


IN_SHORT = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
REPEATED = ("mistral", "qwen2", "gemma", "phi3")  # made of parts that other families have too


# the files that take longest, by the time that they take: first, so that no process waits for the other at the end
LONGEST = (
    "ioi_scripts", "transformer", "ablated", "edge_methods", "compare", "ablate_from", "checkpoints", "other_hands",
    "objective", "parallel", "attribution", "auto_classes", "resume_ioi", "resume_sweep", "weight_training", "code",
    "mnist_run", "resume_finetuning", "notebooks",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Run tests marked `seconds_per_family` for the families of `IN_SHORT`, and those marked `without_repeated` for
    all but `REPEATED`; `make test-slow` runs the others."""
    first = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))
    for item in items:
        if item.get_closest_marker("seconds_per_family") and item.callspec.params["family"] not in IN_SHORT:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("without_repeated") and item.callspec.params["family"] in REPEATED:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Python no longer looks for garbage in what is imported by now, which would take half a second each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # plugins that end the session find imported objects again


@pytest.fixture(params=SMALL)
def family(request):
    """A function that makes a small random model, for every registered family in turn."""
    return partial(small, request.param)


@pytest.fixture(scope="module")
def coarse_importance():
    """The importance of the edges in pictures is integrated over three points; it takes most of a short run's time."""
    from circuit_breaking.evaluation import edge_importance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_importance, "STEPS", 3)
        yield


@pytest.fixture(scope="module")
def coarse_pictures(coarse_importance):
    """Pictures are drawn with few pixels and without fitting their parts together, which takes most of the time.

    For tests that start scripts and do not look at the pictures; `tests/figures` draws them all as they are.
    """
    from circuit_breaking.figures import style

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.RC_PARAMS, "savefig.dpi", 40)
        patch.setattr(style, "Figure", lambda figsize, layout, plain=style.Figure: plain(figsize=figsize))
        yield


@pytest.fixture(scope="module")
def blank_pictures():
    """Pictures are made and saved, but nothing is drawn in them.

    For tests that start scripts and look only whether the files of pictures are there.
    """
    from circuit_breaking.figures import style

    class Blank(style.Figure):
        def draw(self, renderer):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "Figure", lambda figsize, layout: Blank(figsize=figsize))
        yield


@pytest.fixture(scope="module")
def short_choice():
    """How many edges to cut is chosen on two batches; on all of them it takes most of a short training's time.

    For tests that do not look at the choice; `tests/training/test_ranking.py` chooses on all.
    """
    from circuit_breaking.training import prefix_choice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_choice, "BATCHES", SHORT_CHOICE)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, for a look at what is in them."""
    import circuit_breaking.figures as room
    from circuit_breaking.figures import style

    modules = [import_module(f"{room.__name__}.{found.name}") for found in iter_modules(room.__path__)]
    seen, plain = [], style.figure

    @contextmanager
    def spy(*arguments):
        with plain(*arguments) as one:
            yield one
            seen.append(one)

    for module in modules:
        if hasattr(module, "figure"):
            monkeypatch.setattr(module, "figure", spy)
    return seen
