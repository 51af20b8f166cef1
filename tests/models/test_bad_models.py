"""Folders and GGUF files that hold no whole model: one sentence, no random weights, no pickle, no huge memory."""

import json
import os
import shutil
import struct
import tracemalloc
import zipfile

import pytest
import torch
from helpers.gguf_files import write_gguf
from helpers.scripts import save_small_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, OPTConfig

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.gguf import check_gguf
from circuit_breaking.models.load import load_config, load_hf_model, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SOME = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("models") / "whole", n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def tensors(change):
    def changed(folder):
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, {"format": "pt"})

    return changed


def raw(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def settings(name="config.json", **values):
    def changed(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return changed


def only_a_pickle(folder):
    """A pickle that makes a file when it is read, where the weights should be."""
    (folder / WEIGHTS).unlink()
    code = f"cposix\nsystem\n(Vtouch {folder / 'ran'}\ntR.".encode()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", code)


def an_index_of_a_pickle(folder):
    only_a_pickle(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {SOME: "pytorch_model.bin"}}))


def an_index(names):
    def changed(folder):
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return changed


def a_pipe(name):
    def changed(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return changed


BAD = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    "cut weights": (lambda folder: os.truncate(folder / WEIGHTS, 9000), "not a readable safetensors"),
    "empty weights": (raw(WEIGHTS, b""), "not a readable safetensors"),
    "header of 2^60 bytes": (raw(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), "header is said to have"),
    "weights are a pipe": (a_pipe(WEIGHTS), "a named pipe"),
    "one is missing": (tensors(lambda held: held.pop(SOME)), f"lacks weights .*{SOME}"),
    "one of another shape": (tensors(lambda held: held.update({SOME: torch.zeros(8, 31)})), r"\[8, 31\]"),
    "one of whole numbers": (
        tensors(lambda held: held.update({SOME: torch.zeros(8, 32, dtype=torch.int8)})),
        "quantised",
    ),
    "only a pickle": (only_a_pickle, "a pickle, which can run code"),
    "an index of a pickle": (an_index_of_a_pickle, "no safetensors file of its folder"),
    "an index of elsewhere": (an_index({SOME: "../model.safetensors"}), "no safetensors file of its folder"),
    "an index of nothing": (an_index({SOME: "gone.safetensors"}), "no file .*gone.safetensors"),
    "an index without names": (an_index([1]), "names no weights"),
    "a layer too many": (settings(n_layer=3), "lacks weights"),
    "a layer too few": (settings(n_layer=1), "weights of 2 layers, and its configuration says 1"),
    "no layer": (settings(n_layer=0), "says 0 layers"),
    "a thousand million layers": (settings(n_layer=10**9), "says 1000000000 layers"),
    "gigantic width": (settings(n_embd=10**6), "weights, and the files hold"),
    "width beyond numbers": (settings(n_embd=10**12), "makes no model"),
    "gigantic vocabulary": (settings(vocab_size=10**12), "weights, and the files hold"),
    "gigantic context": (settings(n_positions=10**12), "weights, and the files hold"),
    "no heads": (settings(n_head=0), "makes no model"),
    "text for a number": (settings(n_layer="2"), "cannot be read"),
    "NaN for a number": (settings(layer_norm_epsilon=float("nan")), "NaN, which is no number"),
    "unknown family": (settings(model_type="nope"), "model type"),
    "unknown function": (settings(activation_function="nope"), "makes no model"),
    "custom code": (
        settings(model_type="own", auto_map={"AutoConfig": "x.A", "AutoModelForCausalLM": "x.B"}),
        "contains custom code",
    ),
    "configuration empty": (raw("config.json", b""), "is not JSON"),
    "configuration a list": (raw("config.json", b"[1]"), "no JSON object"),
    "configuration too deep": (raw("config.json", b"[" * 100_000), "is not JSON"),
    "configuration no UTF-8": (raw("config.json", b'{"a": "\xff"}'), "is not JSON"),
    "configuration with a number too long": (raw("config.json", b'{"n_layer": ' + b"1" * 5000 + b"}"), "is not JSON"),
    "configuration a pipe": (a_pipe("config.json"), "neither a config.json|a named pipe"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_a_folder_without_a_whole_model(folder, capfd, change, message):
    change(folder)
    before = sorted(path.name for path in folder.iterdir())
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as error:
        load_model(folder, device="cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == before  # no code ran
    assert peak < 50e6
    told = capfd.readouterr()
    assert "[y/N]" not in told.out + told.err


@pytest.mark.parametrize("weights", [None, 2**40])
def test_an_unsupported_family_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, weights):
    OPTConfig().save_pretrained(tmp_path)
    if weights is not None:  # a file without blocks on the disk
        (tmp_path / WEIGHTS).touch()
        os.truncate(tmp_path / WEIGHTS, weights)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(
        UserError, match=r"of type 'opt', is not supported\. Supported models: GPT2LMHeadModel"
    ) as error:
        load_model(tmp_path, device="cpu")
    assert str(tmp_path) in str(error.value)
    GPT2Config(add_cross_attention=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cross-attention, which the graph does not describe"):
        load_model(tmp_path, device="cpu")


def test_an_unsupported_family_on_the_hub_is_refused_before_its_weights_are_downloaded(monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **kwargs: OPTConfig())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match=r"the model some/name, of type 'opt', is not supported"):
        load_model("some/name", device="cpu")


def tokens(change):
    def changed(folder):
        path = folder / "tokenizer.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return changed


BAD_TOKENIZERS = {
    "none": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read|without its tokenizer"),
    "empty": (raw("tokenizer.json", b""), "is not JSON"),
    "an empty object": (raw("tokenizer.json", b"{}"), "cannot be read"),
    "too deep": (raw("tokenizer.json", b"[" * 100_000), "is not JSON"),
    "settings a list": (raw("tokenizer_config.json", b"[1]"), "no JSON object"),
    "settings of another type": (settings("tokenizer_config.json", tokenizer_class=3), "cannot be read"),
    "a negative token": (tokens(lambda t: t["model"]["vocab"].update(zz=-1)), "cannot be read"),
    "a token beyond the model": (tokens(lambda t: t["model"]["vocab"].update(zz=10**9)), "model knows 341 tokens"),
    "a merge of nothing": (tokens(lambda t: t["model"]["merges"].append(["q", "nothing"])), "cannot be read"),
    "an unknown normaliser": (tokens(lambda t: t.update(normalizer={"type": "Nope"})), "cannot be read"),
}


@pytest.mark.parametrize("change, message", BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_a_folder_without_a_whole_tokenizer(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_weights_in_parts_are_read(folder, whole):
    held = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(held))}
    for part in set(names.values()):
        save_file({name: held[name] for name in held if names[name] == part}, folder / part, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    text = torch.tensor([[0, 5, 7]])
    assert torch.equal(load_model(folder, device="cpu")(text), load_model(whole, device="cpu")(text))


def test_a_model_with_buffers_and_heads_of_others_is_read(folder, whole):
    """As older checkpoints of GPT-2 have: causal masks in every layer, and parts that this model has no use for."""
    held = load_file(folder / WEIGHTS)
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8) for n in range(2)}
    save_file({**held, **masks, "score.weight": torch.zeros(2, 8)}, folder / WEIGHTS)
    text = torch.tensor([[0, 5, 7]])
    assert torch.equal(load_model(folder, device="cpu")(text), load_model(whole, device="cpu")(text))


# GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path)
    return path.read_bytes()


def test_a_whole_gguf_is_read(gguf, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf)
    check_gguf(path)
    for place in (path, tmp_path):
        model = load_model(place, device="cpu")
        assert model(torch.tensor([[0, 3]])).isfinite().all() and model.graph.n_layers == 1
    assert len(load_tokenizer(tmp_path)) == load_config(tmp_path).vocab_size


def key(gguf, name):
    """Where the value of a field starts: behind its name and type."""
    return gguf.index(name.encode()) + len(name) + 4


@pytest.mark.parametrize(
    "where, form, value, message",
    [
        (lambda g: 4, "<I", 9, "version 9"),
        (lambda g: 8, "<Q", 2**60, "it ends where"),  # tensors
        (lambda g: 16, "<Q", 2**60, "."),  # fields
        (lambda g: 24, "<Q", 2**62, "it ends where"),  # length of the first name
        (lambda g: key(g, "tokenizer.ggml.tokens") + 4, "<Q", 2**60, "no room for an array"),
        (lambda g: key(g, "tokenizer.ggml.token_type") + 4, "<Q", 2**60, "it ends where"),
        (lambda g: key(g, "tokenizer.ggml.tokens"), "<I", 99, "type 99"),
        (lambda g: key(g, "llama.block_count"), "<I", 10**9, "says 1000000000 layers"),
        (lambda g: key(g, "llama.block_count"), "<I", 2, "lacks weights"),
        (lambda g: key(g, "llama.vocab_size"), "<I", 10**9, "weights, and the files hold"),
        (lambda g: g.index(b"blk.0.attn_q.weight") + 19, "<I", 2**31, "dimensions"),
        (lambda g: g.index(b"blk.0.attn_q.weight") + 23, "<Q", 2**60, "it ends before a tensor"),
        (lambda g: g.index(b"blk.0.attn_q.weight") + 23 + 16, "<I", 77, "type 77"),
        (lambda g: g.index(b"blk.0.attn_q.weight") + 23 + 20, "<Q", 2**40, "it ends before a tensor"),
    ],
)
def test_a_gguf_with_a_damaged_header(gguf, tmp_path, where, form, value, message):
    changed = bytearray(gguf)
    struct.pack_into(form, changed, where(gguf), value)
    path = tmp_path / "model.gguf"
    path.write_bytes(changed)
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as error:
        load_hf_model(path, "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6 and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 4, 20, 100, 5000, -10])
def test_a_gguf_that_is_cut(gguf, tmp_path, size):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf[:size])
    with pytest.raises(UserError, match="not a readable GGUF"):
        load_hf_model(path, "cpu")
