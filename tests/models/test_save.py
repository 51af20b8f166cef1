"""A Hugging Face folder is written as a whole or not at all."""

import pytest
import torch
from helpers.models import small_gpt2, small_llama
from helpers.scripts import small_tokenizer
from safetensors import SafetensorError

from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder

TOKENS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_model_comes_back_and_replaces_the_one_before(tmp_path):
    folder = tmp_path / "deeper" / "model"
    tokenizer = small_tokenizer()
    save_hf_folder(folder, small_llama(), tokenizer)
    (folder / ".parts").mkdir()
    (folder / ".parts" / "checkpoint").write_text("of a run")
    (folder / "model-00001-of-00002.safetensors").write_text("of an older model in two files")
    hf = small_gpt2(vocab_size=len(tokenizer))
    save_hf_folder(folder, hf, tokenizer)
    again = load_hf_model(folder, "cpu")
    assert torch.equal(again(TOKENS).logits, hf(TOKENS).logits)
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert (folder / ".parts" / "checkpoint").read_text() == "of a run"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    plain = tmp_path / "plain"
    plain.touch()
    assert all(path.stat().st_mode == plain.stat().st_mode for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, monkeypatch, error):
    folder, hf = tmp_path / "model", small_gpt2()
    save_hf_folder(folder, hf)
    before = contents(folder)

    def full(path, *args, **kwargs):
        (path / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(hf, "save_pretrained", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(UserError, match=f"cannot write {target}: No space left on device"):
            save_hf_folder(target, hf)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_records_and_model_are_replaced_together(tmp_path):
    folder = tmp_path / "model"
    save_hf_folder(folder, small_gpt2(), None, lambda staged: (staged / "about.json").write_text("{}"))
    before = contents(folder)

    def fail(staged):
        (staged / "about.json").write_text("half")
        raise ValueError("Out of range float values are not JSON compliant: inf")

    with pytest.raises(ValueError, match="inf"):
        save_hf_folder(folder, small_llama(), None, fail)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/model: "):
        save_hf_folder(tmp_path / "file" / "model", small_gpt2())
