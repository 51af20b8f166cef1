"""The shipped model, with and without cut edges, on a small task of lm-eval: equal to figures without it."""

import json

import lm_eval
import pytest
import torch
from helpers.scripts import load_script
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from circuit_breaking import load_ablated, load_tokenizer, save_ablated
from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import read_json

EDGES = ["m1->m2", "m1->a3.2", "m0->a3.0", "m1->a3.0"]
NEW_TOKENS = 6
ROWS = [
    {"text": f"{one} went to the {place}.", "choices": [f" {one} bought some bread.", " The", " You are nice"]}
    for one in ("Tom", "Anna", "Mary and Tom") for place in ("shop", "garden", "school and then to the old shop")
]  # fmt: skip
TASKS = {
    "likelihood": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "continuation": f"""
output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["<|endoftext|>"], do_sample: false, max_gen_toks: {NEW_TOKENS}}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of two tasks, log-likelihood and generation, whose data is a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for name, text in TASKS.items():
            (folder / f"{name}.yaml").write_text(
                f'task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{folder}/rows.jsonl"}}}}\n'
                f'test_split: test\ndoc_to_text: "{{{{text}}}}"\ntarget_delimiter: ""\nmetadata: {{version: 1}}\n{text}'
            )
        yield folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_ablated(folder, "tiny", EDGES)
    return folder


@torch.no_grad()
def log_likelihood(hf, tokenizer, text: str, choice: str) -> float:
    before, tokens = tokenizer(text)["input_ids"], tokenizer(text + choice)["input_ids"]
    log_probabilities = hf(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[at - 1, tokens[at]]) for at in range(len(before), len(tokens)))


def continuation(hf, tokenizer, text: str) -> str:
    tokens = tokenizer(text, return_tensors="pt")
    out = hf.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :]).split("<|endoftext|>")[0]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("kind", ["ablated", "original"])
def test_lm_eval_sees_the_model_that_is_given(tasks, saved, kind, batch_size):
    hf, tokenizer = load_ablated(saved, "cpu"), load_tokenizer("tiny")
    if kind == "original":
        hf.edge_cuts.remove()
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=batch_size), tasks=list(TASKS), bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    best = []
    for sample in found["samples"]["likelihood"]:
        row = ROWS[sample["doc_id"]]
        expected = [log_likelihood(hf, tokenizer, row["text"], choice) for choice in row["choices"]]
        values = [response[0][0] for response in sample["resps"]]
        assert [float(value) for value in values] == pytest.approx(expected, abs=1e-3)
        best.append(max(range(len(expected)), key=expected.__getitem__))
    assert found["results"]["likelihood"]["acc,none"] == pytest.approx(best.count(0) / len(best))
    for sample in found["samples"]["continuation"]:
        row = ROWS[sample["doc_id"]]
        assert sample["resps"][0][0] == continuation(hf, tokenizer, row["text"])


def test_the_script_measures_both(tasks, saved, tmp_path, capsys, monkeypatch):
    script = load_script("evaluate_harness.py")

    def run(model, *names, **more) -> None:
        script.main(script.Settings(**{"include_path": tasks, "limit": 4, **more}, model=model, tasks=names,
                                    out=tmp_path, device="cpu"))  # fmt: skip

    run(str(saved), *TASKS)
    found = read_json(tmp_path / "run" / "harness.json")
    assert set(found["models"]) == {"ablated", "original"} and found["edges"] == EDGES
    assert set(found["models"]["ablated"]["results"]) == set(TASKS)
    assert "likelihood" in capsys.readouterr().out
    run("tiny", "likelihood")
    whole = read_json(tmp_path / "run" / "harness.json")
    assert set(whole["models"]) == {"model"} and whole["edges"] is None
    score = "acc,none"
    assert (
        whole["models"]["model"]["results"]["likelihood"][score]
        == (found["models"]["original"]["results"]["likelihood"][score])
    )
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"lm-eval does not take.*no_such_task"):
        patch.setattr(
            script, "task_manager", lambda settings: TaskManager(include_path=str(tasks), include_defaults=False)
        )
        run("tiny", "no_such_task")
    with pytest.raises(UserError, match="at least one task"):
        run("tiny")
    with pytest.raises(UserError, match="is no folder"):
        run("tiny", "likelihood", include_path=tmp_path / "none")
