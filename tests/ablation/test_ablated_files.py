"""Saving and loading an ablated model, and perplexity by a sliding window."""

import json
import math

import pytest
import torch
from helpers.models import small_gpt2, small_llama
from helpers.records import damage_record
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import load_ablated, read_ablated, save_ablated
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.perplexity import perplexity, windows
from circuit_breaking.models.load import load_hf_model, load_tokenizer
from circuit_breaking.runs.tensors import read_tensors

EDGES = ["embed->a1.0", "m0->m1", "a0.1->a2.2", "a1.1->output"]
TOKENS = torch.arange(1, 10)[None]


def word_tokenizer():
    others = [f"w{number}" for number in range(40)]  # 50 words, as many as the small models know
    words = {word: number for number, word in enumerate(["<|endoftext|>", "<unk>", *"abcdefgh", *others])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>")


def logits(hf):
    with torch.no_grad():
        return hf(TOKENS).logits


@pytest.mark.parametrize("means", [None, torch.randn(13, 24)], ids=["zero", "mean"])
def test_a_saved_model_comes_back_the_same(tmp_path, means):
    hf = small_gpt2()
    plain = logits(hf)
    about, results = {"data": "mild insults", "seed": 3}, {"toxic loss": 4.5}
    with ablate(hf, EDGES, means):  # the cuts of this model must not matter
        expected = logits(hf)
        save_ablated(tmp_path / "model", hf, EDGES, means, about, results, word_tokenizer())
    again = load_ablated(tmp_path / "model", "cpu")
    assert isinstance(again, type(hf))
    assert not again.training
    assert logits(again).equal(expected)
    assert again.edge_cuts.edges == EDGES
    assert means is None or again.edge_cuts.means.equal(means)
    again.edge_cuts.remove()
    assert type(again) is type(hf)
    assert logits(again).equal(plain)
    record = read_ablated(tmp_path / "model")
    assert record.about == about and record.results == results
    assert load_tokenizer(record.base)("a b")["input_ids"] == [2, 3]
    card = (tmp_path / "model" / "README.md").read_text()
    carried = "zero ablation" if means is None else "mean output"
    for said in ("4 of its", "embed->a1.0, m0->m1", carried, "mild insults", "toxic loss", "2309.05973"):
        assert said in card
    suffixes = {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


def test_a_base_that_is_a_folder_travels_and_an_unknown_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
    small_llama().bfloat16().save_pretrained(tmp_path / "base")
    hf = load_hf_model(tmp_path / "base", "cpu", "bfloat16")
    word_tokenizer().save_pretrained(tmp_path / "base")
    save_ablated(tmp_path / "one", tmp_path / "base", ["m0->a1.0.q"])
    (tmp_path / "base" / "config.json").unlink()  # no longer needed
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    assert read_tensors(tmp_path / "elsewhere/model.safetensors")[0]["lm_head.weight"].dtype == torch.bfloat16
    again = load_ablated(tmp_path / "elsewhere", "cpu", "bfloat16")
    with ablate(hf, ["m0->a1.0.q"]):
        assert logits(again).equal(logits(hf))
    with pytest.raises(UserError, match="hub"):
        save_ablated(tmp_path / "two", "no/such-model", EDGES)
    assert not (tmp_path / "two").exists()


def test_saving_again_replaces_and_never_touches_other_files(tmp_path):
    hf = small_gpt2()
    save_ablated(tmp_path / "model", hf, EDGES, torch.zeros(13, 24))
    save_ablated(tmp_path / "model", hf, EDGES[:1])
    assert load_ablated(tmp_path / "model", "cpu").edge_cuts.edges == EDGES[:1]
    assert not list((tmp_path / "model").glob(".*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        save_ablated(tmp_path / "other", hf, EDGES)
    with pytest.raises(UserError, match="no edge"):
        save_ablated(tmp_path / "new", hf, ["m5->m0"])
    with pytest.raises(UserError, match="no fixed positions"):
        save_ablated(tmp_path / "new", hf, EDGES, torch.zeros(4, 13, 24))
    assert not (tmp_path / "new").exists()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["weights", "means", "configuration", "tokenizer", "card"])
def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, monkeypatch, what):
    folder, hf, means = tmp_path / "model", small_gpt2(), torch.zeros(13, 24)
    save_ablated(folder, hf, EDGES, means, tokenizer=word_tokenizer())
    before = contents(folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    place = {
        "weights": "transformers.modeling_utils.safe_save_file",
        "means": "circuit_breaking.runs.tensors.save_file",
        "configuration": "transformers.configuration_utils.PreTrainedConfig.to_json_file",
        "tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
        "card": "circuit_breaking.ablation.saved.write_text",
    }[what]
    monkeypatch.setattr(place, full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(UserError, match="No space left on device"):
            save_ablated(target, hf, EDGES[:1], means + 1, tokenizer=word_tokenizer())
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_results_that_are_not_finite_are_stored_as_null(tmp_path):
    folder, hf = tmp_path / "model", small_gpt2()
    results = {"perplexity": float("inf"), "loss": [float("nan"), 2.5], "steps": torch.tensor(3)}
    save_ablated(folder, hf, EDGES, results=results)
    assert read_ablated(folder).results == {"perplexity": None, "loss": [None, 2.5], "steps": 3}
    before = contents(folder)
    for changed in ({"about": {"model": hf}}, {"results": [1.0]}):
        with pytest.raises((UserError, TypeError)):  # no JSON
            save_ablated(folder, hf, EDGES[:1], **changed)
    with pytest.raises(UserError, match="not finite"):
        save_ablated(folder, hf, EDGES[:1], torch.full((13, 24), float("inf")))
    assert contents(folder) == before


def test_an_unsupported_family_is_refused_before_its_weights_are_read(tmp_path):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "base")  # and no weights
    with pytest.raises(UserError, match="type 'bert' is not supported"):
        save_ablated(tmp_path / "model", tmp_path / "base", EDGES)


def test_damaged_and_foreign_folders(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="no file"):
        load_ablated(folder)
    save_ablated(folder, small_gpt2(), EDGES, torch.zeros(13, 24))
    good = json.loads((folder / "config.json").read_text())

    def with_config(message, **changes):
        (folder / "config.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(UserError, match=message):
            load_ablated(folder, "cpu")

    def with_record(message, **changes):
        with_config(message, edge_ablation={**good["edge_ablation"], **changes})

    damage_record(with_record, "config.json ")
    with_record("damaged", weights=3)
    with_record("base_model_type 'nothing' is unknown", base_model_type="nothing")
    with_record("base_model_type 'edge_ablated' is unknown", base_model_type="edge_ablated")
    with_record("type 'bert'.* is not supported", base_model_type="bert")
    with_record("neither a local folder", weights="/no/such/folder")
    with_record("made for a model with num_hidden_layers 3, and tiny has 4", weights="tiny")
    with_config("describes no saved ablated model", edge_ablation=None)
    with_config("describes no saved ablated model", edge_ablation=[])
    with_config("lacks weights", n_layer=4)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no file"):
        load_ablated(folder)
    (folder / "config.json").write_text(json.dumps(good))
    (folder / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="is code"):
        load_ablated(folder)
    (folder / "modeling.py").unlink()
    (folder / "means.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_ablated(folder)
    (folder / "means.safetensors").unlink()
    with pytest.raises(UserError, match="no file"):
        load_ablated(folder)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 1), (4, 4), (7, 3), (8, 5), (32, 16)])
@pytest.mark.parametrize("length", [2, 5, 9, 20])
def test_every_token_is_predicted_once_with_what_fits_before_it(window, stride, length):
    hf = small_gpt2().double()
    tokens = torch.randint(1, 50, (length,), generator=torch.manual_seed(0))
    context = {}  # token -> how many tokens it was predicted from
    for begin, end, scored in windows(length - 1, window, stride):
        assert end - begin <= window
        for at in range(end + 1 - scored, end + 1):
            assert at not in context
            context[at] = at - begin
    assert sorted(context) == list(range(1, length))
    assert all(seen >= min(at, window - stride + 1) for at, seen in context.items())
    with ablate(hf, EDGES), torch.no_grad():
        found = perplexity(hf, tokens, window, stride)
        loss = -sum(
            hf(tokens[None, at - seen : at]).logits[0, -1].log_softmax(-1)[tokens[at]].item()
            for at, seen in context.items()
        ) / (length - 1)
    assert found.tokens == length - 1
    assert math.isclose(found.loss, loss, rel_tol=1e-6)
    assert math.isclose(found.perplexity, math.exp(loss), rel_tol=1e-5)


def test_perplexity_says_what_does_not_fit():
    hf = small_gpt2()
    with pytest.raises(UserError, match="nothing to predict"):
        perplexity(hf, torch.tensor([1]))
    with pytest.raises(UserError, match="32 positions"):
        perplexity(hf, torch.arange(9), window=33)
    with pytest.raises(UserError, match="left out"):
        perplexity(hf, torch.arange(9), window=4, stride=5)
