"""toxicity/generate.py and benchmarks/generate_time.py, as their users run them."""

import io
import json
import os
import sys

import pytest
import torch
from helpers.models import small_gpt2
from helpers.scripts import load_script
from matplotlib import pyplot as plt
from test_ablated_files import word_tokenizer

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import load_ablated, save_ablated
from circuit_breaking.engine.ablation_values import load_means, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.mask_record import MaskRecord, write_edges
from circuit_breaking.runs.results import Report

pytestmark = pytest.mark.usefixtures("coarse_importance")
EDGES = ["embed->a1.0", "m0->m1", "a0.1->a2.2", "a1.1->output"]

generate = load_script("toxicity/generate.py")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder as train_mask.py leaves it, with means."""
    monkeypatch.setenv("COLUMNS", "200")
    hf = small_gpt2()
    hf.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    engine = load_model(str(tmp_path / "base"), device="cpu")
    save_means(tmp_path / "means.safetensors", engine, torch.randn(13, 24))
    load_means(tmp_path / "means.safetensors", engine)
    engine.mask.cut_(EDGES)
    value = value_in(tmp_path / "means.safetensors")
    record = MaskRecord(ablation_value=value, budget=4, provenance={"settings": {"data": "mild"}})
    save_mask(tmp_path / "run/mask.safetensors", engine, record)
    write_edges(tmp_path / "run", EDGES)
    Report(models={"ablated": {"toxic loss": 4.5}}).write(tmp_path / "run/report.json")
    return tmp_path / "run"


def settings(run, **changes):
    return generate.Settings(ablated=run, new_tokens=6, temperature=0, device="cpu", **changes)


def written(hf, tokenizer, prompt):
    tokens = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
    out = hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def test_both_continuations_are_what_the_models_write(run, capsys):
    tokenizer, models = generate.load_pair(settings(run))
    assert models["original"].lm_head.weight.data_ptr() == models["ablated"].lm_head.weight.data_ptr()
    assert not hasattr(models["original"], "edge_cuts")
    hf, means = small_gpt2(), generate.read_run(run).means
    generate.main(settings(run, prompt="a b c"))
    out = capsys.readouterr().out
    plain = written(hf, tokenizer, "a b c")
    with ablate(hf, EDGES, means):
        cut = written(hf, tokenizer, "a b c")
    assert plain != cut
    line = next(line for line in out.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in line.split("│")[1:3]] == [plain, cut]


def test_prompts_come_from_files_and_from_a_pipe(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a b\n\nc d\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b"}\n{"text": "c d"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n" + "a " * 40 + "\nc d\n"))
    shown = []
    for more in ({"prompts": tmp_path / "prompts.txt"}, {"prompts": tmp_path / "prompts.jsonl"}, {}):
        generate.main(settings(run, **more))
        captured = capsys.readouterr()
        shown.append(captured.out)
    assert shown[0] == shown[1] == shown[2]
    assert shown[0].count("original") == 2
    assert "no room" in captured.err  # the long line of the pipe was skipped, with a message


def test_the_columns_fill_as_the_models_write(run, monkeypatch):
    console = generate.Console(file=io.StringIO(), force_terminal=True, width=80)
    tokenizer, models = generate.load_pair(settings(run))
    seen = []
    monkeypatch.setattr(generate.Live, "update", lambda self, table, refresh: seen.append(list(table.columns[0].cells)))
    generate.compare(models, tokenizer, "a b", settings(run), console)
    assert len(seen) > 2
    assert seen[0] != seen[1]


def test_saving_from_a_run_and_perplexity(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 20)
    of_run, of_saved = (settings(folder, perplexity=tmp_path / "text.txt") for folder in (run, tmp_path / "saved"))
    of_run.save = tmp_path / "saved"
    generate.main(of_run)
    first = capsys.readouterr().out
    generate.main(of_saved)
    assert capsys.readouterr().out in first
    assert "160" in first
    assert load_ablated(tmp_path / "saved", "cpu").edge_cuts.edges == sorted(EDGES, key=EdgeGraph(3, 3).index)
    card = (tmp_path / "saved/README.md").read_text()
    assert "toxic loss" in card
    assert '"data": "mild"' in card
    with pytest.raises(UserError, match="already"):
        generate.main(settings(tmp_path / "saved", save=tmp_path / "again", prompt="a"))


def test_errors_are_sentences(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "rows.jsonl").write_text('{"other": 1}\n')
    save_ablated(tmp_path / "notokenizer", small_gpt2(), EDGES)
    for changed, message in [
        (settings(tmp_path / "nothing"), "train_mask.py"),
        (settings(run, prompt="a " * 40), "Shorten it"),
        (settings(run, prompt="a", prompts=tmp_path / "x"), "Choose one"),
        (settings(run, prompts=tmp_path / "x.txt"), "no file"),
        (settings(run, prompts=tmp_path / "rows.jsonl"), "row 1"),
        (settings(run, perplexity=tmp_path / "bytes.txt"), "not UTF-8"),
        (settings(tmp_path / "notokenizer", prompt="a"), "without its tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            generate.main(changed)
    (run / "mask.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--ablated", str(run), "--prompt", "a"])
    with pytest.raises(SystemExit) as stopped:
        run_script(generate.main, read_settings(generate.Settings))
    assert stopped.value.code == 1 and "not a readable safetensors" in capsys.readouterr().err


def test_generate_time_writes_its_plot_and_numbers(tmp_path, capsys):
    benchmark = load_script("benchmarks/generate_time.py")
    settings = benchmark.Settings(
        shape="tiny", cut=(0, 3), prompt=4, new_tokens=3, rounds=2, threads=1, out=tmp_path, device="cpu"
    )
    benchmark.main(settings)
    assert "x plain" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "generate_time_tiny.json").read_text())
    assert [len(values) for values in numbers["seconds"].values()] == [2, 2, 2]
    assert plt.imread(tmp_path / "generate_time_tiny.png").std() > 0.05
    settings.shape = "huge"
    with pytest.raises(UserError, match="shape"):
        benchmark.main(settings)
    settings.shape, settings.cut = "tiny", (10**6,)
    with pytest.raises(UserError, match="cannot be cut"):
        benchmark.main(settings)


def test_bytes_that_are_not_utf8_do_not_end_the_session(run, capsys, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"a b\ncaf\xe9 c\nd e\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    generate.main(settings(run))
    shown = capsys.readouterr()
    assert "a b" in shown.out and "d e" in shown.out and "\nd e" in shown.out
    assert shown.err.count("error: ") == 1 and r"'caf\udce9 c' holds bytes" in shown.err
    with pytest.raises(UserError, match="not UTF-8 text") as error:
        generate.main(settings(run, prompt=os.fsdecode(b"caf\xe9")))
    assert "\n" not in str(error.value)


def test_tables_are_not_read_as_prose(run, tmp_path):
    (tmp_path / "x.txt").write_text('{"text": "a b c"}\n')
    (tmp_path / "x.csv").write_text("text\na b c\n")
    for name in ("x.txt", "x.csv"):
        for setting in ("prompts", "perplexity"):
            with pytest.raises(UserError, match="is a table"):
                generate.main(settings(run, **{setting: tmp_path / name}))
