"""Ablated models used through transformers: Auto classes, pipelines, save_pretrained, push_to_hub, Trainer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import small_gpt2, small_llama
from safetensors.torch import load_file
from test_ablated import some_edges
from test_ablated_files import word_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments
from transformers import pipeline as make_pipeline
from transformers.utils import hub as client

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.ablated_model import AblatedModel
from circuit_breaking.ablation.saved import load_ablated, read_ablated, save_ablated
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import graph_of
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.runs.files import ROOT

TOKENS = torch.arange(1, 10)[None]


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(TOKENS).logits


def means_of(hf) -> torch.Tensor:
    return torch.randn(len(graph_of(hf.config).sources), hf.config.hidden_size, generator=torch.manual_seed(0))


SERVER = """
import circuit_breaking, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    hf = AutoModelForCausalLM.from_pretrained(line.rstrip(), use_safetensors=True)
    with torch.no_grad():
        save_file({"logits": hf(torch.arange(1, 10)[None]).logits}, line.rstrip() + ".logits")
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere():
    """Logits of a saved model by a process that has only imported the package and transformers, in this order."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:

        def ask(folder: Path) -> torch.Tensor:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            return load_file(f"{folder}.logits")["logits"]

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("with_means", [False, True])
def test_auto_classes_and_load_ablated_give_the_same(family, tmp_path, with_means):
    hf = family()
    edges, means = some_edges(hf, 12), means_of(hf) if with_means else None
    whole = logits(hf)
    with ablate(hf, edges, means):
        cut = logits(hf)
    save_ablated(tmp_path / "one", hf, edges, means, {"data": "mild insults"})
    auto, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "one", use_safetensors=True),
        load_ablated(tmp_path / "one", "cpu"),
    )
    for model in (auto, ours):
        assert logits(model).equal(cut) and not model.training and isinstance(model, AblatedModel)
        assert model.edge_cuts.edges == edges and model.edge_cuts.about == {"data": "mild insults"}
        assert with_means == (model.edge_cuts.means is not None)
    auto.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", use_safetensors=True)
    assert logits(again).equal(cut)
    assert read_ablated(tmp_path / "two").about == {"data": "mild insults"}
    again.edge_cuts.remove()
    assert logits(again).equal(whole) and type(again) is type(hf)
    again.save_pretrained(tmp_path / "whole")
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole", use_safetensors=True)).equal(whole)


def test_a_new_process_gives_the_same(tmp_path, elsewhere):
    for name, make in (("gpt2", small_gpt2), ("llama", small_llama)):
        hf = make()
        save_ablated(tmp_path / name, hf, some_edges(hf, 12), means_of(hf))
        assert elsewhere(tmp_path / name).equal(logits(load_ablated(tmp_path / name, "cpu")))


def test_without_the_package_transformers_refuses_the_folder(tmp_path):
    save_ablated(tmp_path / "model", small_gpt2(), ["m0->m1"])
    code = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "model type `edge_ablated`" in done.stderr and "does not recognize this architecture" in done.stderr


def test_configuration(tmp_path):
    hf = small_gpt2()
    save_ablated(tmp_path / "model", hf, ["m0->m1"], means_of(hf))
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.model_type, config.hidden_size, config.n_embd, config.num_hidden_layers) == (
        "edge_ablated",
        24,
        24,
        3,
    )
    assert config.record.edges == ["m0->m1"] and config.record.ablation == "mean"
    assert config.base_config.to_dict() == {
        **hf.config.to_dict(), "architectures": None, "dtype": "float32", "_name_or_path": str(tmp_path / "model"),
    }  # fmt: skip
    assert config.vocab_size == config.base_config.vocab_size == 50
    config.hidden_size = 8
    assert config.n_embd == 8
    assert hf.config.model_type == "gpt2" and hf.config.architectures is None
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["architectures"] == ["AblatedModelForCausalLM"] and stored["edge_ablation"]["edges"] == ["m0->m1"]
    with pytest.raises(UserError, match="does not hold ablation values"):
        AutoModelForCausalLM.from_config(config)
    save_ablated(tmp_path / "zero", hf, ["m0->m1"])
    random = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "zero"))
    assert random.edge_cuts.edges == ["m0->m1"]
    assert type(config) not in AutoModel._model_mapping  # the body alone would be refused


def test_the_first_position_of_the_cuts_is_kept(tmp_path):
    hf = small_llama()
    edges, means = some_edges(hf, 12), means_of(hf)
    with ablate(hf, edges, means, ablate_from=2):
        cut = logits(hf)
        hf.save_pretrained(tmp_path / "one")
    save_ablated(tmp_path / "two", hf, edges, means, ablate_from=2)
    for name in ("one", "two"):
        for model in (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, use_safetensors=True),
            load_ablated(tmp_path / name, "cpu"),
        ):
            assert model.edge_cuts.ablate_from == 2 and logits(model).equal(cut)
        assert read_ablated(tmp_path / name).ablate_from == 2
        assert "cut from position 2 on" in (tmp_path / name / "README.md").read_text()
    with pytest.raises(UserError, match="ablate_from is -1"):
        save_ablated(tmp_path / "three", hf, edges, ablate_from=-1)


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_the_class_of_the_base_model_refuses_the_folder(tmp_path, make):
    hf = make()
    save_ablated(tmp_path / "model", hf, ["m0->m1"])
    with pytest.raises(Exception, match="import circuit_breaking, and load it with AutoModelForCausalLM"):
        type(hf).from_pretrained(tmp_path / "model")


def test_arguments_of_from_pretrained(tmp_path):
    hf = small_llama()
    edges = some_edges(hf, 12)
    save_ablated(tmp_path / "outer" / "inner", hf, edges, means_of(hf))
    load = AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "outer", subfolder="inner", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), logits(load_ablated(tmp_path / "outer/inner", "cpu")))
    half = load(tmp_path / "outer/inner", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and logits(half).equal(
        logits(load_ablated(tmp_path / "outer/inner", "cpu", torch.bfloat16))
    )
    assert load(tmp_path / "outer/inner", torch_dtype="bfloat16").dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert logits(load(tmp_path / "half", dtype="auto")).equal(logits(half))
    mapped = load(tmp_path / "outer/inner", device_map="cpu")
    assert logits(mapped).equal(logits(load_ablated(tmp_path / "outer/inner", "cpu")))
    assert load(tmp_path / "outer/inner", use_cache=False).config.use_cache is False
    with pytest.raises(UserError, match="would be quantised"):
        load(tmp_path / "outer/inner", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="safetensors alone"):
        load(tmp_path / "outer/inner", **{"use_safetensors": False})
    (tmp_path / "outer/inner/means.safetensors").unlink()
    with pytest.raises(UserError, match="lacks its ablation values"):
        load(tmp_path / "outer", subfolder="inner")


def test_a_folder_that_names_its_base(tmp_path):
    save_ablated(tmp_path / "model", "tiny", ["m1->m2"])
    assert not (tmp_path / "model" / "model.safetensors").exists()
    hf = load_hf_model("tiny", "cpu")
    with ablate(hf, ["m1->m2"]):
        cut = logits(hf)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert logits(auto).equal(cut) and logits(load_ablated(tmp_path / "model", "cpu")).equal(cut)
    auto.save_pretrained(tmp_path / "full")  # with weights
    assert (tmp_path / "full" / "model.safetensors").exists()
    assert logits(load_ablated(tmp_path / "full", "cpu")).equal(cut)


def test_pipelines_take_the_folder(tmp_path):
    tokenizer = word_tokenizer()
    hf = small_gpt2()
    edges = some_edges(hf, 12)
    save_ablated(tmp_path / "model", hf, edges, tokenizer=tokenizer)
    keywords = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_full_text": False}
    found = make_pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")("a b c", **keywords)
    with ablate(hf, edges):
        tokens = tokenizer("a b c", return_tensors="pt")
        config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=0)
        expected = tokenizer.decode(hf.generate(**tokens, generation_config=config)[0, 3:], skip_special_tokens=True)
    assert found[0]["generated_text"] == expected


def test_a_saved_ablated_model_is_no_base(tmp_path):
    save_ablated(tmp_path / "model", small_gpt2(), ["m0->m1"])
    for use in (lambda: load_hf_model(tmp_path / "model"), lambda: load_model(tmp_path / "model"),
                lambda: save_ablated(tmp_path / "two", tmp_path / "model", ["m0->m2"])):  # fmt: skip
        with pytest.raises(UserError, match="saved ablated model"):
            use()


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: pushed files are written there, and a repository's name is its path in it."""

    def commit(repo_id, operations, **keywords):
        for operation in operations:
            target = tmp_path / "hub" / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)
        return SimpleNamespace(commit_url="")

    def no_card(name, **keywords):
        raise client.EntryNotFoundError("no card")

    api = SimpleNamespace(create_repo=lambda name, **k: SimpleNamespace(repo_id=name), create_commit=commit)
    monkeypatch.setattr(client, "hf_api", lambda: api)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: api)
    monkeypatch.setattr(client.ModelCard, "load", no_card)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, revision=None, allow_patterns=None: str(tmp_path / "hub" / name),
    )
    return tmp_path / "hub"


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_keeps_its_cuts(hub, tmp_path, how, elsewhere):
    hf = small_gpt2()
    edges, means = some_edges(hf, 12), means_of(hf)
    with ablate(hf, edges, means):
        cut = logits(hf)
        if how == "push_to_hub":
            hf.push_to_hub("user/repo")
        else:
            hf.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="user/repo")
    assert logits(AutoModelForCausalLM.from_pretrained(hub / "user/repo", use_safetensors=True)).equal(cut)
    assert logits(load_ablated("user/repo", "cpu")).equal(cut)
    card = (hub / "user/repo/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and edges[0] in card and "- edge-ablation" in card
    assert elsewhere(hub / "user/repo").equal(cut)


def test_a_card_on_the_hub_stays(hub, monkeypatch):
    hf = small_gpt2()
    with ablate(hf, ["m0->m1"]):
        hf.push_to_hub("user/repo")
        mine = Path(hub / "user/repo/README.md")
        mine.write_text("my own words")
        monkeypatch.setattr(client.ModelCard, "load", lambda name, **keywords: client.ModelCard("my own words"))
        hf.push_to_hub("user/repo")
    assert mine.read_text().endswith("my own words")


def test_a_name_that_is_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing is neither a folder nor an ablated model on"):
        load_ablated("nobody/nothing")


# Training


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(1, 50, (9,), generator=torch.manual_seed(number))
        return {"input_ids": tokens, "labels": tokens}


def trainer(hf, folder, **keywords) -> Trainer:
    arguments = TrainingArguments(
        folder, **{"max_steps": 10, "save_steps": 5, "learning_rate": 1e-2, **keywords}, per_device_train_batch_size=2,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(hf, arguments, train_dataset=Rows(), eval_dataset=Rows())


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_trainer_keeps_the_cuts(make, tmp_path, elsewhere):
    hf = make(**({name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} if make is small_gpt2 else {}))
    edges, means = some_edges(hf, 12), means_of(hf)
    save_ablated(tmp_path / "start", hf, edges, means)
    model = load_ablated(tmp_path / "start", "cpu", trainable=True)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    before = logits(model.eval())
    trainer(model, tmp_path / "run").train()
    trained = logits(model.eval())
    assert not torch.allclose(trained, before, atol=1e-3) and model.edge_cuts.means.equal(means)
    last = tmp_path / "run" / "checkpoint-10"
    assert elsewhere(last).equal(trained)
    assert logits(load_ablated(last, "cpu")).equal(trained)
    resumed = load_ablated(tmp_path / "start", "cpu", trainable=True)
    trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    torch.testing.assert_close(logits(resumed.eval()), trained)
    best = load_ablated(tmp_path / "start", "cpu", trainable=True)
    keywords = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5}
    work = trainer(best, tmp_path / "best", **keywords)
    work.train()
    assert logits(best.eval()).equal(logits(load_ablated(work.state.best_model_checkpoint, "cpu")))
    work.save_model(tmp_path / "final")
    assert logits(load_ablated(tmp_path / "final", "cpu")).equal(logits(best))
