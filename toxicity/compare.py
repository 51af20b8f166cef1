"""The whole comparison from end to end: masks of each budget, nine other ways, random edges, relearning.

Reads   the shipped model, or another one with its data. Each part is a script of this folder and can be run by itself.
Writes  data/toxicity/<run>/: masks/ and finetuned/ (the models), report.json, report.md, report.csv, evidence.json,
        relearning.json, uniform.csv, costs.json, every .png, and logs/ (the output of each part).
Time    18 minutes of CPU time for the shipped model, by default shared by two cores.

Parts that do not depend on each other run at the same time, each on one thread, so that results do not depend on the
number of cores. Results that depend on the seed alone are the same each time; costs are in costs.json and at the end of
report.md and report.html. The same command continues an interrupted comparison with the models that are missing. A
finished comparison is computed again.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.settings import ScorerSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, check_not_negative, option
from circuit_breaking.runs.settings import AblateFromSettings, Float32ModelSettings, SeedSettings
from circuit_breaking.toxicity.settings import ToxicRunSettings, ToxicTextSettings, require_data
from circuit_breaking.training.baselines import METHODS


@dataclass
class Settings(
    ToxicTextSettings, Float32ModelSettings, AblateFromSettings, ScorerSettings, ToxicRunSettings, SeedSettings
):
    MOST_USED: ClassVar = (
        "model",
        "budgets",
        "examined_budget",
        "methods",
        "seeds",
        "run",
        "seed",
        "device",
        "workers",
    )

    run: str = "compare"
    budgets: tuple[int, ...] = (1, 2, 5, 12, 25, 50)  # most edges to cut: one mask for each budget
    learned_budgets: tuple[int, ...] = ()  # budgets of masks with learned ablation constants, besides examined_budget
    examined_budget: int = 12  # budget of the masks that are examined closely: each edge, several seeds, relearning
    seeds: int = 3  # masks with examined_budget, and number of times that continuations are sampled
    random_seeds: int = 5  # random masks for each budget
    methods: tuple[str, ...] = tuple(METHODS)  # other ways to remove the behaviour, of finetune_gpt2.py
    lrs: tuple[float, ...] = ()  # learning rates to try for each of methods; none: those of finetune_gpt2.py
    steps: int = 200  # most steps of fine-tuning
    num_texts: int = 300  # most held-out texts of each kind
    num_prompts: int = 100  # most prompts of each kind
    num_control: int = 30  # most texts and prompts of each kind for random masks
    scorer: str = "profanity-check"  # profanity-check (offline; the shipped model was made with it), detoxify or auto
    save_generations: bool = False  # keep the models' texts, and put examples into report.md: OFFENSIVE TEXT
    device: str = "cpu"  # cpu, cuda, mps or auto
    workers: int = 2  # parts that run at the same time
    threads: int = 1  # CPU threads of each part; the shipped model gains nothing from more

    def check(self) -> None:
        check_not_negative(self, "ablate_from")
        check_counts(self, "seeds", "workers", "threads", "num_texts", "num_prompts", "num_control", "steps")
        if self.examined_budget not in self.budgets:
            raise UserError(
                f"examined_budget is {self.examined_budget}, which is none of the budgets. Set it to one of them."
            )
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from circuit_breaking.evaluation.conclusion import statement
from circuit_breaking.evaluation.result_files import read_models
from circuit_breaking.runs.files import plain, read_json, write_json
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.script_process import ScriptProcess
from circuit_breaking.runs.signals import Stopped, stop_signals

HERE = Path(__file__).resolve().parent
ABLATIONS = ("zero", "mean", "optimal")  # kinds of ablation value; "optimal" is learned with the mask
PRELOADED = (  # what the parts import that takes longest
    "circuit_breaking.engine.load",
    "circuit_breaking.evaluation.compared_models",
    "circuit_breaking.evaluation.scorers",
    "circuit_breaking.figures.browser.page",
)
BEGUN = "begun.json"  # settings of a comparison that is not finished
Part = tuple[str, str, list[str]]  # name, script, options


def stages(settings: Settings) -> list[list[Part]]:
    """Parts that may run at the same time, stage by stage."""
    folder = settings.out / settings.run
    data = [
        f"{option(name)}={value}"
        for name in ("toxic_train", "toxic_test", "ordinary", "text_column")
        if (value := getattr(settings, name)) is not None
    ]
    common = [f"--run={settings.run}", f"--out={settings.out}", f"--device={settings.device}"]
    model = [*common, f"--model={settings.model}", f"--seed={settings.seed}", *data]
    masks = [
        f"--stable-budget={settings.examined_budget}", f"--seeds={settings.seeds}",
        f"--random-seeds={settings.random_seeds}", f"--ablate-from={settings.ablate_from}",
    ]  # fmt: skip
    learned = sorted({*settings.learned_budgets, settings.examined_budget})
    budgets = {ablation: learned if ablation == "optimal" else settings.budgets for ablation in ABLATIONS}
    examined = [folder / "masks" / f"{ablation}_{settings.examined_budget}" for ablation in ABLATIONS]
    keep = ["--save-generations"] if settings.save_generations else []
    scorer = f"--scorer={settings.scorer}"
    tuned = [folder / "finetuned"] if settings.methods else []
    measured = [
        "--models", folder / "masks", *tuned, "--greedy", f"--seeds={settings.seeds}", "--samples=1",
        f"--num-texts={settings.num_texts}", f"--num-prompts={settings.num_prompts}",
        f"--num-control={settings.num_control}", "--batch-size=256", scorer, *keep,
    ]  # fmt: skip
    making = [
        (
            f"masks_{ablation}",
            "sweep_masks.py",
            [*model, *masks, "--ablations", ablation, "--budgets", *budgets[ablation]],
        )
        for ablation in reversed(ABLATIONS)  # what takes longest comes first
    ]
    if settings.methods:
        chosen = ["--methods", *settings.methods, f"--steps={settings.steps}"]
        chosen += ["--lrs", *map(str, settings.lrs)] if settings.lrs else []
        making.insert(1, ("finetuned", "finetune_gpt2.py", [*model, *chosen]))
    parts = [
        making,
        [
            ("evaluation", "evaluation.py", [*model, *measured]),
            ("relearning", "relearn.py", [*model, "--models", *examined, *tuned, scorer, *fewer(settings, 5, 2)]),
            (
                "evidence",
                "edge_evidence.py",
                [*model, "--masks", *examined, "--similar", folder / "masks", *fewer(settings, 2)],
            ),
        ],
        [("report", "report.py", [*common[:2], *(["--examples"] if settings.save_generations else [])])],
    ]
    return [[(name, script, list(map(str, options))) for name, script, options in stage] for stage in parts]


def fewer(settings: Settings, texts: int, prompts: int = 0) -> list[str]:
    """Options for a part that measures many times: so much fewer texts, and prompts if it takes any."""
    options = [f"--num-texts={max(1, settings.num_texts // texts)}"]
    return options + ([f"--num-prompts={max(1, settings.num_prompts // prompts)}"] if prompts else [])


def run_part(part: Part, settings: Settings, signals: Sequence[int] = ()) -> float:
    """Run a script as a process that prints into a log, and return its seconds.

    The first signal that arrives in `signals` is passed on to the process, and ends the run.
    """
    name, script, options = part
    stopped = Stopped(f"stopped by a signal in or before {name}; run the same command again to continue.")
    if signals:
        raise stopped
    log = settings.out / settings.run / "logs" / f"{name}.txt"
    start, passed_on = time.perf_counter(), False
    try:
        process = ScriptProcess(
            HERE / script, options, log, settings.threads, PRELOADED if settings.device == "cpu" else ()
        )
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror or error}. Choose another folder with out.") from error
    while (code := process.poll()) is None:
        if signals and not passed_on:
            process.send_signal(signals[0])
            passed_on = True
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if code and signals:
        raise stopped
    if code:
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-1:]
        raise UserError(f"toxicity/{script} ended with exit code {code} ({' '.join(last)}); {log} tells the rest.")
    print(f"{name}: {seconds:.0f} s (toxicity/{script})", flush=True)
    return seconds


def prepare(folder: Path, settings: Settings) -> None:
    """Delete the models of earlier comparisons, which would be compared too; not those of this one, interrupted."""
    begun = json.loads(json.dumps({**asdict(settings), "workers": None}, default=plain))
    path = folder / BEGUN
    if not path.is_file() or read_json(path) != begun:
        for made in ("masks", "finetuned"):
            shutil.rmtree(folder / made, ignore_errors=True)
    write_json(path, begun)


def main(settings: Settings) -> None:
    settings.check()
    folder, start = settings.out / settings.run, time.perf_counter()
    with locked(folder), stop_signals() as signals, ThreadPoolExecutor(settings.workers) as pool:
        prepare(folder, settings)
        for stage in stages(settings):
            running = [pool.submit(run_part, part, settings, signals) for part in stage]
            for one in running:
                one.result()
        (folder / BEGUN).unlink()
    print(f"\n{statement(read_models(folder))}\n")
    print(f"{time.perf_counter() - start:.0f} s in all; read {folder / 'report.md'}, or open report.html beside it")


if __name__ == "__main__":
    run_script(main, settings)
