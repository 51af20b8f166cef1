"""Run a script with many settings, here or under SLURM, and gather the results into one table and a plot.

    python sweep.py toxicity/train_mask.py --grid alpha=0.1,0.2,0.4 seed=0:3 --y loss.after.toxic
    python sweep.py toxicity/train_mask.py --grid seed=0:20 --fixed model=gpt2 --cluster slurm --at-once 4

Reads   nothing; the script reads its own data.
Writes  data/sweeps/<name>/: a run folder and a log for each job; sweep.csv, one row per job; sweep.png.
Time    that of the jobs.

The same command, given again, runs the jobs that are missing or failed and keeps the results of the others. If the
sweep is stopped (Ctrl-C, SIGTERM, a closed terminal), it stops its running jobs, which save their state, and the same
command continues.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import tyro

from circuit_breaking.errors import UserError, first_line
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.files import DATA, ROOT, read_json, write_csv, write_json
from circuit_breaking.runs.grid import combinations, parse_grid

if TYPE_CHECKING:
    from circuit_breaking.runs.jobs import Job


@dataclass(kw_only=True)
class Settings:
    MOST_USED: ClassVar = ("script", "grid", "fixed", "name", "out", "cluster", "at_once", "x", "y")

    script: tyro.conf.Positional[Path]  # script to run, such as toxicity/train_mask.py; it takes --out and --run
    grid: tuple[str, ...] = ()  # settings to vary: alpha=0.1,0.2, or seed=0:5 for 0 to 4
    fixed: tuple[str, ...] = ()  # settings that all jobs share: model=gpt2 max-edges=12
    name: str = "sweep"  # name of the sweep's folder, in the folder out
    out: Path = DATA / "sweeps"  # folder that holds the sweeps
    cluster: Literal["local", "slurm"] = "local"  # run jobs as processes on this machine, or as jobs of SLURM
    at_once: int = 1  # jobs that run at the same time
    minutes: int = 60  # time limit of a job
    gpus: int = 0  # GPUs of a job under SLURM
    cpus: int = 4  # CPU cores of a job under SLURM
    partition: str = ""  # SLURM partition; empty: the default of the cluster
    x: str = ""  # column for the plot's x axis; empty: the first setting of the grid
    y: str = ""  # column for its y axis; empty: the last loss that the script reports

    def check(self) -> None:
        if not self.path.is_file():
            raise UserError(f"there is no script {self.script}.")
        check_counts(self, "at_once")
        if several := [name for name, values in parse_grid(self.fixed).items() if len(values) > 1]:
            raise UserError(f"{several[0]} has several values: put it into --grid.")
        if not self.grid:
            raise UserError("--grid is empty.")
        combinations(parse_grid(self.grid))

    @property
    def path(self) -> Path:
        """The script, which may be named from the repository's root."""
        return self.script if self.script.is_file() else ROOT / self.script


if __name__ == "__main__":
    settings = read_settings(Settings)

import sys
import time
from collections.abc import Callable

from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.sweep import draw_sweep
from circuit_breaking.runs.jobs import LocalJob, SlurmJob, run_job, stop_all
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import SIGNALS, TERMINAL_SIGNALS, Stopped, stop_signals
from circuit_breaking.runs.sweep import command_of, main_columns, results_of


def main(settings: Settings) -> None:
    settings.check()
    grid, fixed = parse_grid(settings.grid), parse_grid(settings.fixed)
    shared = {name: values[0] for name, values in fixed.items()}
    jobs = combinations(grid)
    folder = (settings.out / settings.name).resolve()
    with locked(folder):
        commands = [command_of(settings.path, shared, job, folder, name_of(job)) for job in jobs]
        rows = run_all(settings, folder, commands, jobs)
        write_csv(folder / "sweep.csv", rows)
    x = settings.x.replace("_", "-") or next(iter(grid))
    draw_sweep(folder, x, settings.y)
    end_with_page(folder)
    show(rows, list(grid))
    print(f"written to {folder}")


def name_of(job: dict[str, str]) -> str:
    """Name of a job's run folder: its settings."""
    return "_".join(f"{key}={value.replace('/', '-')}" for key, value in job.items())


def run_all(settings: Settings, folder: Path, commands: list[list[str]], jobs: list[dict[str, str]]) -> list[dict]:
    """Run what is not done yet, at most `at_once` at a time; a row for every job, failed or not."""
    start = launcher(settings, folder)
    outcomes: dict[int, dict] = {}
    waiting, running = [], {}
    for number, (job, command) in enumerate(zip(jobs, commands, strict=True)):
        done = folder / f"{name_of(job)}.json"
        record = read_json(done) if done.is_file() else {}
        if record.get("command") == command and record.get("exit_code") == 0:
            outcomes[number] = record
        else:
            waiting.append(number)
    bar = progress_bar(total=len(jobs), initial=len(outcomes), desc="sweep", unit="job")
    with bar, stop_signals((*SIGNALS, *TERMINAL_SIGNALS)) as signals:
        while waiting or running:
            if signals:
                print(f"\nstopping {len(running)} running jobs", file=sys.stderr)
                stop_all(list(running.values()), signals)
                raise Stopped(
                    f"stopped by signal {signals[0]} with {len(running)} running jobs, which were stopped too. Run the "
                    "same command again to continue."
                )
            while waiting and len(running) < settings.at_once:
                number = waiting.pop(0)
                running[number] = start(commands[number], folder / f"{name_of(jobs[number])}.log")
            for number in [number for number, job in running.items() if job.done()]:
                outcomes[number] = {"command": commands[number], **running.pop(number).result()}
                write_json(folder / f"{name_of(jobs[number])}.json", outcomes[number])
                bar.update()
            time.sleep(0.1)
    rows = []
    for number, job in enumerate(jobs):
        code = outcomes[number]["exit_code"]
        row = {**job, "exit_code": code, "seconds": outcomes[number].get("seconds")}
        rows.append(row | (results_of(folder / name_of(job)) if code == 0 else {}))
    return rows


def launcher(settings: Settings, folder: Path) -> "Callable[[list[str], Path], Job]":
    """What starts a job, here or on a cluster, from its command and the file for its output."""
    if settings.cluster == "local":
        return lambda command, log: LocalJob(command, log, settings.minutes)
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError(
            "sweeps under SLURM are run by submitit, which is not installed: pip install -e '.[cluster]'"
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="slurm")
    except RuntimeError as error:
        raise UserError(f"there is no SLURM here ({first_line(error)}). Set cluster to local.") from error
    executor.update_parameters(
        timeout_min=settings.minutes, name=settings.name, gpus_per_node=settings.gpus, cpus_per_task=settings.cpus
    )
    if settings.partition:
        executor.update_parameters(slurm_partition=settings.partition)
    return lambda command, log: SlurmJob(executor.submit(run_job, command, str(log)))


def cell(value: float | str | None) -> str:
    """A value as the table shows it."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def show(rows: list[dict], names: list[str]) -> None:
    """Print the settings and outcome of every job."""
    columns = main_columns(rows, names)
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    header = [column.replace("_", " ").replace(".", " ") for column in columns]
    print_table(header, cells, f"{sum(row['exit_code'] == 0 for row in rows)} of {len(rows)} jobs done")
    for row in rows:
        if row["exit_code"] != 0:
            name = name_of({key: row[key] for key in names})
            print(f"failed: {name} (exit code {row['exit_code']}); see {name}.log")


if __name__ == "__main__":
    run_script(main, settings)
