"""Properties that hold for all inputs: written files are read back, and all other files are refused in one sentence."""

import gzip
import json
import re
import struct
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import small_gpt2
from helpers.scripts import small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_breaking.ablation.weight_mask import WeightMask, find_matrices, load_weight_mask, save_weight_mask
from circuit_breaking.engine.ablation_values import load_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.figures.edge_graph import read_graph
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.ioi import prompts as words
from circuit_breaking.mnist import idx
from circuit_breaking.models.tokens import encode, pad_right
from circuit_breaking.runs.checkpoints import Checkpoints
from circuit_breaking.runs.files import (
    atomic_path,
    is_text,
    parse_json,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    write_csv,
    write_json,
    write_jsonl,
    write_text,
)
from circuit_breaking.runs.grid import combinations, parse_grid
from circuit_breaking.runs.mask_record import MaskRecord
from circuit_breaking.runs.sweep import flatten, read_table
from circuit_breaking.runs.tensors import read_tensors, write_tensors
from circuit_breaking.tasks.ioi import read_prompts
from circuit_breaking.tasks.toxic import read_examples
from circuit_breaking.toxicity.html import clean_html
from circuit_breaking.toxicity.inputs import read_prompt_rows
from circuit_breaking.toxicity.uniform import read_uniform

QUICK = settings(
    derandomize=True, deadline=None, max_examples=60, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
HF = small_gpt2(n_layer=2, n_head=2, n_embd=8)
MODEL = load_model(HF, device="cpu")
MATRICES = {granularity: find_matrices(HF, granularity) for granularity in ("weight", "neuron", "head")}
TOKENIZER = small_tokenizer()
TEMPORARY = tempfile.TemporaryDirectory(prefix="properties")  # gone with this module
FOLDER = Path(TEMPORARY.name)
FILE = FOLDER / "file"

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


# Written files are read back


@QUICK
@given(st.sets(st.integers(0, len(MODEL.graph) - 1)), st.dictionaries(texts, texts | st.integers(-9, 9), max_size=3))
def test_any_subset_of_edges_comes_back(cut, about):
    names = [MODEL.graph.edges[index] for index in cut]
    MODEL.mask.reset_()
    MODEL.mask.cut_(names)
    save_mask(FILE, MODEL, MaskRecord(results=about))
    MODEL.mask.reset_()
    assert load_mask(FILE, MODEL).results == about
    assert {str(edge) for edge in MODEL.mask.cut_edges()} == set(names)
    assert MODEL.mask.n_cut() == len(cut)
    MODEL.mask.reset_()


@QUICK
@given(st.lists(st.floats(0, 1, width=32), min_size=len(MODEL.graph), max_size=len(MODEL.graph)))
def test_any_weights_come_back(values):
    with torch.no_grad():
        MODEL.mask.weights.copy_(torch.tensor(values))
    save_mask(FILE, MODEL)
    MODEL.mask.reset_()
    load_mask(FILE, MODEL)
    assert MODEL.mask.weights.tolist() == values
    MODEL.mask.reset_()


@QUICK
@given(st.integers(0, 4), st.randoms(use_true_random=False))
def test_any_means_come_back(positions, random):
    shape = ([positions] if positions else []) + [len(MODEL.graph.sources), 8]
    count = int(np.prod(shape))
    means = torch.tensor([random.uniform(-1e3, 1e3) for _ in range(count)]).reshape(shape)
    save_means(FILE, MODEL, means)
    load_means(FILE, MODEL)
    assert torch.equal(MODEL.means, means)
    MODEL.means = None


@QUICK
@given(st.data())
def test_any_units_come_back(data):
    granularity = data.draw(st.sampled_from(list(MATRICES)))
    units = {}
    for matrix in data.draw(st.lists(st.sampled_from(MATRICES[granularity]), unique_by=lambda matrix: matrix.name)):
        chosen = data.draw(st.sets(st.integers(0, matrix.count - 1), min_size=1, max_size=5))
        units[matrix.name] = torch.tensor(sorted(chosen))
    save_weight_mask(FILE, HF, WeightMask(granularity, units))
    there = load_weight_mask(FILE, HF)
    assert there.granularity == granularity and there.units.keys() == units.keys()
    assert all(torch.equal(there.units[name], units[name]) for name in units)


@QUICK
@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.randoms(use_true_random=False), st.booleans())
def test_any_images_come_back(shape, random, packed):
    values = np.array([random.randrange(256) for _ in range(np.prod(shape))], np.uint8).reshape(shape)
    data = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + values.tobytes()
    FILE.write_bytes(gzip.compress(data, 1) if packed else data)
    assert (idx.read_idx(FILE, 3) == values).all()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@QUICK
@given(json_values, st.lists(json_values, max_size=4))
def test_any_json_comes_back(value, rows):
    write_json(FILE, value)
    assert read_json(FILE) == value
    assert write_jsonl(FILE, rows) == len(rows)
    assert read_jsonl(FILE) == rows
    checkpoints = Checkpoints(FOLDER, {"value": value})
    checkpoints.save(2, {}, {"value": value})
    assert checkpoints.load().values["value"] == value
    checkpoints.remove()


@QUICK
@given(st.dictionaries(texts.filter(bool), st.lists(st.integers(0, 3), max_size=3), max_size=3), st.data())
def test_any_tensors_come_back(shapes, data):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {
        name: torch.randn(shape).to(data.draw(st.sampled_from(dtypes)))
        for name, shape in shapes.items()
        if name != "__metadata__"
    }
    write_tensors(FILE, tensors, {"a": [1, None]})
    there, about = read_tensors(FILE)
    assert about == {"a": [1, None]} and there.keys() == tensors.keys()
    assert all(torch.equal(there[name], tensors[name]) and there[name].dtype == tensors[name].dtype for name in there)


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


@QUICK
@given(st.lists(cells, min_size=1, max_size=4, unique=True), st.integers(0, 4), st.data())
def test_any_table_comes_back(names, count, data):
    rows = [{name: data.draw(cells) for name in names} for _ in range(count)]
    write_csv(FILE, rows)
    assert read_csv(FILE) == rows


@QUICK
@given(texts, texts, st.booleans())
def test_a_file_is_the_old_one_or_the_new_one(old, new, fails):
    write_text(FILE, old)
    with suppress(KeyError), atomic_path(FILE) as temporary:
        temporary.write_text(new[: len(new) // 2] if fails else new, encoding="utf-8", newline="")
        if fails:
            raise KeyError
    assert FILE.read_bytes().decode() == (old if fails else new)
    assert [path.name for path in FOLDER.iterdir()] == ["file"]


# Text


TAGS = ["<br>", "<br/>", "<wbr>", "<s>", "</s>", "<span class='quote'>", "</span>", "<p>", "</div", "<", "&gt;", "&#0;"]
TAGS += ["&amp;lt;", "<!--", "-->", "<script>x</script>", "<a href='#p1' class='quotelink'>&gt;&gt;1234</a>", "\x00"]
plain_words = st.text("abcdefgh", min_size=1, max_size=6)


@QUICK
@given(st.lists(st.sampled_from(TAGS) | texts, max_size=12).map("".join))
def test_any_tags_become_plain_text(source):
    text = clean_html(source)
    assert is_text(text) and text == text.strip()
    assert not re.search("[\x00-\x09\x0b-\x1f]|  |\n\n| \n|\n ", text)


@QUICK
@given(st.lists(plain_words, min_size=1, max_size=8), st.lists(st.sampled_from(["", "<s>", "<i>", "<b>"]), max_size=8))
def test_br_separates_words_and_no_other_tag_loses_any(some, tags):
    assert clean_html("<br>".join(some)).split() == some
    inside = [f"{tag}{word}{tag.replace('<', '</')}" for tag, word in zip(tags, some, strict=False)]
    assert clean_html("<br>".join(inside)).split() == some[: len(inside)]


@QUICK
@given(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 4))
def test_padding_keeps_every_token_in_its_place(rows, size):
    batch = pad_right(rows, 7)
    assert [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)] == rows
    assert (batch.tokens[~batch.real] == 7).all() and int(batch.real.sum()) == sum(map(len, rows))
    assert int(batch.predicted.sum()) == sum(len(row) - 1 for row in rows)
    parts = [row[:n].tolist() for part in batch.batches(size) for row, n in zip(part.tokens, part.lengths, strict=True)]
    assert parts == rows


@QUICK
@given(st.lists(texts, max_size=5), st.integers(2, 12), st.booleans())
def test_any_texts_are_encoded_or_refused(some, length, end):
    try:
        batch = encode(TOKENIZER, some, 0, length, end)
    except UserError:
        assert not any(TOKENIZER(text)["input_ids"] for text in some)
        return
    filled = [text for text in some if TOKENIZER(text)["input_ids"]]
    assert len(batch) == len(filled)
    for row, n, text in zip(batch.tokens.tolist(), batch.lengths.tolist(), filled, strict=True):
        expected = [0, *TOKENIZER(text)["input_ids"], *([0] if end else [])]
        assert row[:n] == expected[:length]


# Grids


names_of_settings = st.text("abcdef-", min_size=1, max_size=5).filter(lambda name: name.strip("-"))
values_of_settings = st.text("abc0123456789.-", min_size=1, max_size=5)


@QUICK
@given(
    st.dictionaries(
        names_of_settings.map(lambda name: name.strip("-")),
        st.lists(values_of_settings, min_size=1, max_size=4), max_size=4
    )
)  # fmt: skip
def test_any_grid_is_parsed(grid):
    assert parse_grid([f"{name}={','.join(values)}" for name, values in grid.items()]) == grid
    jobs = combinations(grid)
    assert len(jobs) == np.prod([len(values) for values in grid.values()], initial=1)
    for name, values in grid.items():
        seen, share = Counter(job[name] for job in jobs), len(jobs) // len(values)
        assert seen == {value: count * share for value, count in Counter(values).items()}


@QUICK
@given(st.integers(-99, 99), st.integers(-99, 99), st.integers(-9, 9))
def test_a_range_is_pythons(start, stop, step):
    expected = list(map(str, range(start, stop, step))) if step else []
    try:
        assert parse_grid([f"a={start}:{stop}:{step}"]) == {"a": expected}
    except UserError:
        assert not expected


@QUICK
@given(st.integers(0, 6), st.integers(1, 5), st.booleans(), st.booleans())
def test_every_edge_has_one_name_and_one_place(layers, heads, split_qkv, parallel):
    graph = EdgeGraph(layers, heads, split_qkv, parallel)
    assert len(set(graph.edges)) == len(graph)
    assert [graph.index(edge) for edge in graph.edges] == list(range(len(graph)))


# Any file at all is read or refused


numbers = st.integers(-(2**80), 2**80) | st.floats() | st.booleans()
anything = st.recursive(
    st.none() | numbers | st.text(max_size=8) | st.sampled_from(["text", "prompt", "a0.0->m0", "embed->output"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["text", "prompt", "toxicity", "IO", "S", "graph", "edges", "n_layers", "n_heads", "names", "templates"]
KEYS += ["places", "objects", "settings", "weights", "means", "format", "granularity", "id"]
objects = st.dictionaries(st.sampled_from(KEYS), anything, max_size=6)
LOADERS = {
    "json": read_json, "jsonl": read_jsonl, "csv": read_csv, "table": read_table, "lines": read_lines,
    "examples": read_examples, "uniform": read_uniform, "prompts": read_prompts, "prompt rows": read_prompt_rows,
    "words": words.read_words, "graph": read_graph, "tensors": read_tensors, "idx": lambda path: idx.read_idx(path, 3),
    "mask": lambda path: load_mask(path, MODEL), "means": lambda path: load_means(path, MODEL),
    "weight mask": lambda path: load_weight_mask(path, HF),
}  # fmt: skip


def read_or_refused(load):
    try:
        load(FILE)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@QUICK
@given(st.binary(max_size=200) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(load, data):
    FILE.write_bytes(data)
    read_or_refused(load)


@pytest.mark.parametrize("name", ["json", "jsonl", "examples", "uniform", "prompts", "prompt rows", "words", "graph"])
@QUICK
@given(st.lists(anything | objects, min_size=1, max_size=3))
def test_any_json_is_read_or_refused(name, values):
    FILE.write_text("\n".join(map(json.dumps, values)))
    read_or_refused(LOADERS[name])


@pytest.mark.parametrize("name", ["tensors", "mask", "means", "weight mask"])
@QUICK
@given(objects, st.dictionaries(st.sampled_from([*KEYS, "x"]), st.lists(st.integers(0, 3), max_size=3), max_size=3))
def test_any_record_and_tensors_are_read_or_refused(name, about, shapes):
    write_tensors(FILE, {key: torch.zeros(shape) for key, shape in shapes.items()}, about)
    read_or_refused(LOADERS[name])
    MODEL.means = None


@QUICK
@given(anything)
def test_numbers_of_any_json_are_found(value):
    found = flatten(value)
    assert all(type(number) in (int, float) for number in found.values())
    with suppress(ValueError):  # where a number does not fit
        assert json.dumps(parse_json(json.dumps(value), nan=True)) == json.dumps(value)


@QUICK
@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_words_are_a_grid_or_refused(some):
    with suppress(UserError):
        combinations(parse_grid(some))
