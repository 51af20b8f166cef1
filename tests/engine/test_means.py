"""Means against a plain float64 average over single texts, their files, and the script that computes them."""

import numpy as np
import pytest
import torch
from helpers.scripts import PLAIN, RUDE, called, load_script, save_small_model

from circuit_breaking.engine.ablation_values import compute_means, load_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import pad_right
from circuit_breaking.runs.files import write_jsonl, write_text
from circuit_breaking.runs.mask_record import MeansRecord
from circuit_breaking.runs.tensors import write_tensors

script = load_script("toxicity/compute_means.py")
ROWS = [[0, 5, 7, 9, 11, 3], [0, 4], [0, 8, 8, 8], [0, 21, 2, 6], [0, 9, 1]]


def outputs_by_hand(model, rows):
    """Outputs of every node at every token of every text, one text at a time: list over texts of float64 [P, T, D]."""
    return [model.node_outputs(torch.tensor([row]))[:, 0].double().numpy() for row in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_mean_over_all_tokens_but_padding(family, batch_size):
    model = load_model(family(), device="cpu")
    means = compute_means(model, pad_right(ROWS, 0), batch_size=batch_size)
    expected = np.concatenate(outputs_by_hand(model, ROWS), 1).mean(1)
    assert means.dtype == torch.float32 and means.shape == expected.shape
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_mean_at_each_position(family, batch_size):
    model = load_model(family(), device="cpu")
    means = compute_means(model, pad_right(ROWS, 0), by_position=True, batch_size=batch_size)
    outputs = outputs_by_hand(model, ROWS)
    for position in range(6):
        there = [text[:, position] for text in outputs if text.shape[1] > position]
        np.testing.assert_allclose(means[position], np.mean(there, 0), rtol=1e-5, atol=1e-6)


def test_a_position_that_no_text_reaches_takes_the_overall_mean(family):
    model = load_model(family(), device="cpu")
    batch = pad_right(ROWS, 0)
    batch = type(batch)(torch.nn.functional.pad(batch.tokens, (0, 2)), batch.lengths)  # two columns of padding
    means = compute_means(model, batch, by_position=True)
    assert means.shape[0] == 8
    overall = compute_means(model, pad_right(ROWS, 0))
    torch.testing.assert_close(means[6:], overall.expand(2, -1, -1))


def test_padding_tokens_do_not_matter(family):
    model = load_model(family(), device="cpu")
    assert torch.equal(compute_means(model, pad_right(ROWS, 0)), compute_means(model, pad_right(ROWS, 33)))


@pytest.mark.seconds_per_family
def test_sums_are_kept_in_float64(family):
    """One large output among many small ones: float32 sums would lose the small ones."""
    model = load_model(family(), device="cpu")
    plain = model.node_outputs
    model.node_outputs = lambda tokens: torch.where(tokens[None, :, :, None] == 7, 2.0**24, plain(tokens) * 0 + 1.0)
    rows = [[7, 5]] + [[4, 5]] * 99
    means = compute_means(model, pad_right(rows, 0), batch_size=1)
    torch.testing.assert_close(means, torch.full_like(means, (2**24 + 199) / 200), rtol=1e-7, atol=0)


def test_means_come_back_from_their_file(family, tmp_path):
    model = load_model(family(), device="cpu")
    for by_position in (False, True):
        means = compute_means(model, pad_right(ROWS, 0), by_position)
        save_means(tmp_path / "means.safetensors", model, means, MeansRecord(num_texts=7, provenance={"note": "mine"}))
        other = load_model(family(), split_qkv=True, device="cpu")
        record = load_means(tmp_path / "means.safetensors", other)
        assert torch.equal(other.means, means) and record.graph["n_layers"] == 3
        assert (record.model, record.num_texts, record.provenance) == (model.name, 7, {"note": "mine"})


def test_files_that_do_not_fit(family, tmp_path):
    model = load_model(family(), device="cpu")
    width = model.embedding.shape[1]
    path = tmp_path / "means.safetensors"
    with pytest.raises(UserError, match=r"no file .* Make one with toxicity/compute_means.py"):
        load_means(path, model)
    for shape in ((3, width), (width,), (2, 3, width), (len(model.graph.sources), width + 1)):
        write_tensors(path, {"means": torch.zeros(shape)}, {"model": "another"})
        with pytest.raises(UserError, match=r"another.*do not fit this model") as error:
            load_means(path, model)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    write_tensors(path, {"means": torch.full((len(model.graph.sources), width), torch.nan)})
    with pytest.raises(UserError, match="not finite"):
        load_means(path, model)
    write_tensors(path, {"weights": torch.zeros(3)})
    with pytest.raises(UserError, match="holds no means"):
        load_means(path, model)
    write_text(path, "not a tensor")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_means(path, model)
    assert model.means is None


# The script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("means")
    save_small_model(folder / "model")
    write_text(folder / "plain.txt", "\n".join(PLAIN))
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in RUDE])
    write_text(folder / "empty.txt", "\n")
    return folder


def settings(folder, **changes):
    given = {"ordinary": str(folder / "plain.txt"), "toxic_train": folder / "train.jsonl", "device": "cpu", **changes}
    return script.Settings(model=str(folder / "model"), num_texts=20, **given)


@pytest.mark.parametrize("texts", ["ordinary", "toxic"])
@pytest.mark.parametrize("kind, ablate_from", [("zero", 1), ("mean", 1), ("mean", 0), ("position", 1), ("position", 2)])
def test_the_script_writes_means_of_training_texts(folder, tmp_path, capsys, kind, ablate_from, texts):
    path = tmp_path / "means.safetensors"
    given = {} if ablate_from == 1 else {"ablate_from": ablate_from}  # 1 is the default
    script.main(settings(folder, kind=kind, texts=texts, out=path, length=9, **given))
    said = "zeros" if kind == "zero" else f"{kind} of 20 {texts} texts"
    assert said in capsys.readouterr().out
    model = load_model(str(folder / "model"), device="cpu")
    model.ablate_from = ablate_from
    record = load_means(path, model)
    assert (
        record.ablate_from == ablate_from
        and record.provenance["settings"]["kind"] == kind
        and record.num_texts == (0 if kind == "zero" else 20)
    )
    assert record.model == str(folder / "model") and len(record.provenance["inputs"]) == (1 if kind == "zero" else 2)
    tokenizer = script.load_tokenizer(str(folder / "model"))
    # every fifth ordinary text is held out
    chosen = [text for number, text in enumerate(PLAIN) if number % 5] if texts == "ordinary" else RUDE
    rows = [[0, *tokenizer(text)["input_ids"]][:9] for text in chosen[:20]]
    model.means, means = None, model.means
    expected = {
        "zero": torch.zeros(len(model.graph.sources), 24),
        "mean": compute_means(model, pad_right(rows, 0)),
        "position": compute_means(model, pad_right(rows, 0), by_position=True),
    }[kind]
    torch.testing.assert_close(means, expected)


BAD = {
    "no text file": ({"ordinary": "none.txt"}, "no file"),
    "no text in it": ({"ordinary": "empty.txt"}, "holds no text"),
    "no posts": ({"texts": "toxic", "toxic_train": "none.jsonl"}, "no file .*toxic_data_for_eval"),
    "nothing to predict": ({"length": 1}, "at least 2"),
    "longer than the model": ({"length": 900, "ordinary": "long.txt"}, "positions"),
    "no texts asked for": ({"num_texts": 0}, "num_texts is 0"),
    "no cut acts": ({"length": 9, "ablate_from": 9}, "no cut acts in the 9 tokens"),
    "a negative position": ({"ablate_from": -1}, "it cannot be negative"),
    "no such type": ({"dtype": "float16"}, "not one of"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(folder, tmp_path, changes, message):
    write_text(folder / "long.txt", "\n".join(" ".join(PLAIN[i : i + 9]) for i in range(9)))
    changes = dict(changes)
    for name in ("ordinary", "toxic_train"):
        if name in changes:
            changes[name] = str(folder / changes[name])
    given = {"ordinary": str(folder / "plain.txt"), "device": "cpu", "out": tmp_path / "out" / "x.safetensors"}
    with pytest.raises(UserError, match=message) as error:
        script.main(script.Settings(**{"model": str(folder / "model"), **given, **changes}))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_on_the_command_line(folder, tmp_path):
    out = tmp_path / "out" / "means.safetensors"
    failed = called("toxicity/compute_means.py", "--model", folder / "model", "--ordinary", "none.txt", "--out", out)
    assert failed.returncode == 1 and failed.stdout == "" and not out.parent.exists()
    assert failed.stderr.splitlines()[-1].startswith("error: there is no file none.txt")
