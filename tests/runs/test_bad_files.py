"""What every loader refuses in one sentence: paths that are no files, invalid numbers, false headers."""

import json
import os
import struct
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.dumps import lines_of, ndjson, random_threads, tar, zst
from helpers.models import small_gpt2
from helpers.scripts import load_script

from circuit_breaking.ablation.weight_mask import WeightMask, find_matrices, load_weight_mask, save_weight_mask
from circuit_breaking.engine.ablation_values import load_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.figures.edge_graph import read_graph
from circuit_breaking.figures.sweep import draw_sweep
from circuit_breaking.ioi import prompts as words
from circuit_breaking.mnist import idx
from circuit_breaking.mnist.network import save_network
from circuit_breaking.runs import files
from circuit_breaking.runs.checkpoints import NEWEST, Checkpoints
from circuit_breaking.runs.files import is_text, parse_json, read_csv, read_json, read_jsonl, read_lines, write_json
from circuit_breaking.runs.mnist_results import NetworkRecord
from circuit_breaking.runs.tensors import read_tensors, write_tensors
from circuit_breaking.runs.texts import read_texts
from circuit_breaking.tasks.ioi import read_prompts
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.tasks.toxic import read_examples
from circuit_breaking.toxicity.inputs import read_prompt_rows
from circuit_breaking.toxicity.uniform import read_uniform

HF = small_gpt2(n_layer=1, n_head=2, n_embd=8)
MODEL = load_model(HF, device="cpu")
mlp, dump = (load_script(path) for path in ("mnist/mlp_model.py", "toxicity/toxic_data_for_eval.py"))
LOADERS = {
    "dump": lambda path: dump.main(dump.Settings(dump=path)),
    "text": read_lines,
    "texts": lambda path: load_texts(path, 10),
    "column": lambda path: read_texts(path, "content"),
    "examples": read_examples,
    "uniform": read_uniform,
    "prompts": read_prompts,
    "prompt rows": read_prompt_rows,
    "words": words.read_words,
    "idx": lambda path: idx.read_idx(path, 3),
    "json": read_json,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "graph": read_graph,
    "tensors": read_tensors,
    "mask": lambda path: load_mask(path, MODEL),
    "means": lambda path: load_means(path, MODEL),
    "weight mask": lambda path: load_weight_mask(path, HF),
    "network": mlp.load_network,
}


def refused(load, path, message="."):
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_is_no_regular_file_is_refused(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "none", tmp_path / "none" / "none"):
        refused(load, path)
    for path in ("/dev/zero", "/dev/full", "/proc/self/mem", "/" + "a" * 300, "/x" * 3000, "/a\0b"):
        refused(load, Path(path))
    (tmp_path / "empty").write_bytes(b"")
    if load not in (read_jsonl, read_csv, read_prompt_rows):
        refused(load, tmp_path / "empty")


def test_files_too_large_to_be_read_are_not_begun(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 2**40)  # takes no room
    for load in (read_json, read_jsonl, read_csv, read_lines, read_examples, words.read_words):
        refused(load, path, "more than the .* that are read here")
    monkeypatch.setattr(files, "MAX_LINE", 100)
    path.write_text("1\n" + "[" + " " * 200 + "]\n")
    refused(read_jsonl, path, "line 2: .*more than 100 bytes in one line")


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "-1e999", "1" * 20, "1" * 5000, "[" * 100_000, '"\x00"'])
def test_json_whose_numbers_are_none(tmp_path, text):
    path = tmp_path / "file"
    path.write_text(f'{{"a": {text}}}')
    refused(read_json, path, "is not JSON")
    path.write_text(f'{{"a": 1}}\n{{"a": {text}}}\n')
    if "N" not in text and "I" not in text:  # the log of a run that diverged holds these
        refused(read_jsonl, path, "line 2: not JSON")


def test_json_keeps_what_fits():
    for value in (2**63 - 1, -(2**63), 1e308, 5e-324, 0.1, [True, None, "é"]):
        assert parse_json(json.dumps(value)) == value


LONE = json.dumps("a \ud800 b")


@pytest.mark.parametrize(
    "load, row, message",
    [
        (read_examples, f'{{"text": {LONE}}}', "row 1: 'text' holds text that UTF-8 cannot encode"),
        (read_examples, '{"text": 3}', "row 1: 'text' holds int, not text"),
        (read_examples, '{"id": 3}', "row 1: there is no 'text'"),
        (read_uniform, f'{{"text": {LONE}, "toxicity": 0.5}}', "row 1"),
        (read_uniform, '{"text": "a", "toxicity": NaN}', "row 1"),
        (read_uniform, '{"text": "a", "toxicity": true}', "row 1"),
        (read_prompts, f'{{"text": {LONE}, "IO": "A", "S": "B"}}', "row 1"),
        (read_prompts, f'{{"text": "a", "IO": {LONE}, "S": "B"}}', "row 1"),
        (read_prompt_rows, f'{{"prompt": {LONE}}}', "row 1: 'prompt' holds text that UTF-8 cannot encode"),
        (read_prompt_rows, '{"prompt": null, "text": "a"}', "row 1: 'prompt' holds null, not text"),
        (read_prompt_rows, '["a"]', "row 1: there is neither a 'prompt' nor a 'text'"),
    ],
)
def test_rows_that_no_tokenizer_takes(tmp_path, load, row, message):
    (tmp_path / "rows").write_text(row)
    refused(load, tmp_path / "rows", message)


def test_texts():
    assert is_text("") and is_text("\U0001f600 é \x00") and not is_text("\udcff") and not is_text(None)


def test_a_path_that_is_no_utf8_is_recorded(tmp_path):
    write_json(tmp_path / "settings.json", {"path": os.fsdecode(b"a\xff")})
    assert os.fsencode(read_json(tmp_path / "settings.json")["path"]) == b"a\xff"


def test_tables_with_a_name_twice(tmp_path):
    (tmp_path / "sweep.csv").write_text("a,a\n1,2\n")
    refused(read_csv, tmp_path / "sweep.csv", "two columns of one name")
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    refused(lambda folder: draw_sweep(folder, "a"), tmp_path, "lacks the columns")


# safetensors


def st_file(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "twice": (b'{"a": ' + json.dumps(FOUR).encode() + b', "a": ' + json.dumps(FOUR).encode() + b"}", "twice"),
    "overflow": ({"a": {**FOUR, "shape": [2**40, 2**40]}}, "."),
    "beyond the file": ({"a": {**FOUR, "shape": [2**20], "data_offsets": [0, 2**22]}}, "."),
    "overlap": ({"a": FOUR, "b": FOUR}, "."),
    "hole": ({"a": {**FOUR, "data_offsets": [2, 6]}}, "."),
    "negative": ({"a": {**FOUR, "shape": [-1]}}, "."),
    "no such type": ({"a": {**FOUR, "dtype": "F31"}}, "."),
    "too deep": (b"[" * 100_000, "."),
    "record no object": ({"__metadata__": {"about": "[1]"}, "a": FOUR}, "record is no JSON object"),
    "record no JSON": ({"__metadata__": {"about": "{"}, "a": FOUR}, "."),
    "metadata of numbers": ({"__metadata__": {"about": 1}, "a": FOUR}, "."),
}


@pytest.mark.parametrize("header, message", HEADERS.values(), ids=HEADERS)
def test_safetensors_headers_that_lie(tmp_path, header, message):
    refused(read_tensors, st_file(tmp_path / "file", header, bytes(4)), f"not a readable safetensors.*{message}")


def test_a_header_longer_than_its_file(tmp_path):
    path = tmp_path / "file"
    for length in (100, 2**40, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        refused(read_tensors, path, "header is said to have")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_masks_and_means_of_another_type(tmp_path, dtype):
    path = tmp_path / "file"
    save_mask(path, MODEL)
    about = read_tensors(path)[1]
    write_tensors(path, {"weights": torch.ones(len(MODEL.graph)).to(dtype)}, about)
    refused(lambda path: load_mask(path, MODEL), path, "outside")
    save_means(path, MODEL, torch.ones(len(MODEL.graph.sources), 8).to(dtype))
    refused(lambda path: load_means(path, MODEL), path, "not finite floating-point numbers")


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_masks_outside_zero_and_one(tmp_path, value):
    save_mask(tmp_path / "file", MODEL)
    weights, about = read_tensors(tmp_path / "file")
    weights["weights"][3] = value
    write_tensors(tmp_path / "file", weights, about)
    refused(lambda path: load_mask(path, MODEL), tmp_path / "file", "outside")


UNITS = {
    "out of range": (torch.tensor([1, 10**6]), "numbers below"),
    "negative": (torch.tensor([-1, 3]), "numbers below"),
    "repeated": (torch.tensor([1, 1]), "twice"),
    "not sorted": (torch.tensor([3, 1]), "rising order"),
    "fractions": (torch.tensor([1.5]), "numbers below"),
    "of two dimensions": (torch.tensor([[1]]), "numbers below"),
    "truths": (torch.tensor([False, True]), "numbers below"),
}


@pytest.mark.parametrize("units, message", UNITS.values(), ids=UNITS)
def test_weight_masks_of_units_that_are_none(tmp_path, units, message):
    name = find_matrices(HF, "weight")[0].name
    save_weight_mask(tmp_path / "file", HF, WeightMask("weight", {name: torch.tensor([1])}))
    about = read_tensors(tmp_path / "file")[1]
    write_tensors(tmp_path / "file", {name: units}, about)
    refused(lambda path: load_weight_mask(path, HF), tmp_path / "file", message)
    for granularity in (None, [], "nothing"):
        write_tensors(tmp_path / "file", {name: torch.tensor([1])}, {**about, "granularity": granularity})
        refused(lambda path: load_weight_mask(path, HF), tmp_path / "file", "granularity")


def test_a_checkpoint_that_says_something_else(tmp_path, capsys):
    """Its checksum is right, its contents are not."""
    from circuit_breaking.runs.checkpoints import _digest

    checkpoints = Checkpoints(tmp_path, {"seed": 0})
    checkpoints.save(3, {"x": torch.ones(2)}, {"price": 1.0})
    tensors, about = read_tensors(tmp_path / NEWEST)
    about.pop("sha256")
    changes = [{"step": "3"}, {"step": None}, {"values": [1]}, {"run": 1}]
    states = [{"random.cpu": torch.ones(3)}, {"random.cudax": torch.ones(3)}, {"random.": torch.ones(3)}]
    for told, held in [(change, {}) for change in changes] + [({}, state) for state in states]:
        new, changed = {**tensors, **held}, {**about, **told}
        write_tensors(tmp_path / NEWEST, new, {**changed, "sha256": _digest(new, changed)})
        assert checkpoints.load() is None
        assert capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"first.weight": torch.zeros(2**31, 0)},
        {"first.weight": torch.zeros(0, 2**31)},
        {"first.weight": torch.zeros(4)},
        {"last.weight": torch.zeros(2, 9)},
        {"first.bias": torch.full((3,), torch.nan)},
        {"first.bias": torch.zeros(3, dtype=torch.int32)},
    ],
)
def test_networks_whose_layers_do_not_fit(tmp_path, change):
    save_network(tmp_path / "file", mlp.MaskedMLP(4, 3, 2), NetworkRecord())
    mlp.load_network(tmp_path / "file")
    tensors, header = read_tensors(tmp_path / "file")
    write_tensors(tmp_path / "file", tensors | change, header)
    refused(mlp.load_network, tmp_path / "file", "does not hold a network")


# Archives


def sparse(kind):
    """An archive with a sparse member: what it holds can be longer than the archive without limit."""
    info = tarfile.TarInfo("x.ndjson")
    info.size = 4
    if kind == "old":
        info.type = tarfile.GNUTYPE_SPARSE
        return info.tobuf(tarfile.GNU_FORMAT) + b"abcd" + bytes(2044)
    info.pax_headers = {
        "0.0": {"GNU.sparse.size": "99", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "4"},
        "0.1": {"GNU.sparse.map": "0,4", "GNU.sparse.size": str(2**60)},
        "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**60)},
    }[kind]
    return info.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n4\n".ljust(512, b"\0") + bytes(2048)


@pytest.mark.parametrize("kind", ["old", "0.0", "0.1", "1.0"])
def test_sparse_members_are_refused(kind):
    for data in (sparse(kind), zst(sparse(kind))):
        with pytest.raises(UserError, match=r"damaged tar archive .*sparse"):
            lines_of(data)


def test_many_global_headers_are_refused():
    one = tarfile.TarInfo.create_pax_global_header({"a": "x" * 2**19})
    with pytest.raises(UserError, match="global headers"):
        lines_of(one * 4 + tar({"x.ndjson": ndjson(random_threads(5))}))
    assert lines_of(one + tar({"x.ndjson": ndjson(random_threads(5))}))
