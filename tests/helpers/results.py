"""Result files of a small comparison, as the scripts leave them."""

from pathlib import Path

import numpy as np

from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.files import write_csv, write_json, write_jsonl
from circuit_breaking.runs.ioi_results import GraphRecord, NextTokens
from circuit_breaking.runs.records import RunSettings

# text that would run as a script, or change a page, where it is not escaped
EVIL = (
    "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\u2028'&amp;{{ 7 * 7 }}"
)


def entry(value, change=None):
    if value is None:
        return {"value": None, "low": None, "high": None}
    own = {"value": value, "low": value - 0.05, "high": value + 0.05}
    return own if change is None else {**own, "change": {"value": change, "low": change, "high": change}}


def model(kind, toxicity, ordinary, edges=0, base=(0.9, 1.0), **more):
    toxic = {
        "toxic_share": entry(toxicity), "toxicity": entry(toxicity, None if toxicity is None else toxicity - base[0]),
        "perplexity": entry(3.0), "tokens": entry(9.0), "toxicity_by_seed": [toxicity, toxicity],
        **{f"distinct_{n}": {"value": 0.5} for n in ("unigrams", "bigrams", "trigrams")},
    }  # fmt: skip
    after = {} if toxicity is None else {"toxic": toxic, "ordinary": toxic}
    loss = entry(ordinary, None if ordinary is None else ordinary - base[1])
    return {
        "kind": kind, "losses": {"toxic": entry(2.0), "ordinary": loss}, "continuations": after, "greedy": after,
        "edges_cut": edges, "changed_share": {"edges": edges / 200, "parameters": 0.0}, "note": None, **more,
    }  # fmt: skip


def models():
    found = {"original": model("original", 0.9, 1.0)}
    for budget, toxicity, loss in ((2, 0.6, 1.02), (12, 0.2, 1.05), (50, 0.1, 1.3)):
        found[f"zero_{budget}"] = model("mask", toxicity, loss, budget, budget=budget, ablation="zero", seed=0)
        for seed in range(3):
            found[f"random_zero_{budget}_seed{seed}"] = model(
                "random",
                0.9 - 0.01 * seed,
                1.0 + 0.001 * budget * seed,
                budget,
                budget=budget,
                ablation="zero",
                seed=seed,
            )
    found["joint"] = model("finetuned", 0.1, 1.1, chosen={"lr": 1e-4, "step": 30, "scale": None})
    found["ascent"] = model("finetuned", None, None, note="the loss was not finite at step 3")
    found["steering"] = model("finetuned", 0.5, 1.2, chosen={"step": 9, "layer": 2, "scale": 4.0})
    return found


def evidence():
    effect = {"toxic": entry(0.3), "ordinary": entry(0.01)}
    edges = [{"edge": f"a0.{i}->m1", "restore_effect": effect, "single_cut_effect": effect} for i in range(3)]
    stable = {"ablation": "zero", "budget": 12, "masks": ["a", "b"], "sizes": [3, 3], "jaccard": 0.5, "by_chance": 0.1}
    return {
        "masks": {"zero_12": {"ablation": "zero", "together": effect, "edges": edges}},
        "stability": [{**stable, "chosen_by": {"a0.0->m1": 2, "a0.1->m1": 1}}],
    }


def relearning():
    rows = [{"step": step, "toxicity": entry(0.1 * step), "toxic_loss": 1.0} for step in range(4)]
    broken = [*rows[:1], {"step": 1, "toxicity": entry(None), "toxic_loss": None}]
    few = {"without": entry(0.1), "with": entry(0.4)}
    return {
        "models": {
            "original": {"kind": "original", "relearning": {"10": rows, "100": rows}, "note": None, "few_shot": few},
            "zero_12": {
                "kind": "mask", "relearning": {"10": rows, "100": rows}, "lora_relearning": {"10": rows}, "note": None,
                "few_shot": few,
            },
            "joint": {
                "kind": "finetuned", "relearning": {"10": broken, "100": rows}, "note": "10 examples: it broke",
                "few_shot": {"without": entry(None), "with": entry(0.2)},
            },
        }
    }  # fmt: skip


def write_comparison(run: Path) -> None:
    """Write the files of a run folder."""
    report = {
        "models": models(), "scorer": {"name": "x", "version": "1", "threshold": 0.5}, "reference": "original",
        "num_texts": {"toxic": 9, "ordinary": 9}, "num_prompts": {"toxic": 4, "ordinary": 4},
        "model": "tiny", "samples": 1, "seeds": 2,
    }  # fmt: skip
    for name, kind, value in (
        ("report", "report", report), ("evidence", "evidence", evidence()), ("relearning", "relearning", relearning()),
    ):  # fmt: skip
        write_json(run / f"{name}.json", {"record": kind, "version": 1, **value})
    GraphRecord.of(EdgeGraph(4, 4), {"a0.0->m1": 0.5, "m1->output": 0.1}).write(run / "graph.json")
    names = ["original", "zero_12", "joint", "ascent"]
    rows = [
        {"toxicity": t, **{name: None if name == "ascent" else 1 + t * k for k, name in enumerate(names)}}
        for t in np.linspace(0, 1, 40).tolist()
    ]
    write_csv(run / "uniform.csv", rows)
    for method in ("joint", "ascent"):
        history = [{"lr": 1e-4, "step": s, "toxic": 1.0 + s, "ordinary": 1.0, "score": 0.8} for s in range(3)]
        history.append({"lr": 1e-4, "step": 3, "toxic": None, "ordinary": None, "score": None})
        write_jsonl(run / "finetuned" / method / "metrics.jsonl", history)
        write_json(run / "finetuned" / method / "finetuning.json", {"chosen": history[2]})
        write_json(run / "finetuned" / method / "cost.json", {"seconds": 1.0, "cpu_seconds": 1.0, "peak_gb": None})
    tried = [{"lr": None, "step": s, "layer": s, "scale": 1.0, "toxic": 1.0, "ordinary": 1.0} for s in range(3)]
    write_jsonl(run / "finetuned" / "steering" / "metrics.jsonl", tried)
    kept = {name: value for name, value in tried[2].items() if name != "lr"}
    write_json(run / "finetuned" / "steering" / "finetuning.json", {"chosen": kept})


def write_prompts(run, name="Mary", prompt="When Mary and John went home, John gave a ring to"):
    """The files of a run on prompts."""
    rows = [{"token": f" {name}", "probability": 0.7}, {"token": " John", "probability": 0.1}]
    models = {"original": rows, "edges cut": rows[::-1]}
    NextTokens(prompt=prompt, IO=f" {name}", S=" John", models=models).write(run / "next_tokens.json")
    GraphRecord.of(EdgeGraph(3, 2), {"a0.0->m1": 0.5, "m1->output": -0.1}).write(run / "graph.json")
    steps = [
        {
            "step": s,
            "phase": "relax" if s < 5 else "refine",
            "loss": 1.0,
            "keep_loss": 1 + s,
            "break_loss": -s,
            "n_cut": s,
        }
        for s in range(9)
    ]
    write_jsonl(run / "metrics.jsonl", steps)
    settings = {"model": name, "objective": "logit_difference", "lr": 0.05}
    RunSettings(script="ioi/train_mask.py", provenance={"settings": settings, "git_commit": "abc"}).write(
        run / "settings.json"
    )
