"""The MNIST scripts come out the same when they are interrupted, on scikit-learn's small digits."""

import os
import signal

import pytest
from helpers.scripts import Killed, die
from test_mnist_run import SMALL, main, old

from circuit_breaking.errors import UserError
from circuit_breaking.runs import signals
from circuit_breaking.runs.checkpoints import NEWEST, PREVIOUS, Checkpoints
from circuit_breaking.runs.files import read_json, read_jsonl
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.runs.tensors import read_tensors

pytestmark = pytest.mark.usefixtures("coarse_pictures")
QUICK = {
    main: {"steps": 12, "ramp_steps": 4, "round_every": 5, "train_steps": 20, "max_edges": 9, "evaluate_every": 5},
    old: {"steps": 9, "train_steps": 20, "n_keep": 20, "evaluate_every": 2},
}
STEPS = {main: 2 * 20 + 4 * 12, old: 20 + 2 * 9}
NAMES = {main: "main", old: "old"}


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def start(script, out, **changes):
    script.main(script.Settings(out=out, checkpoint_every=5, **{**SMALL, **QUICK[script], **changes}))


def made(script, out):
    """The results of a run, without times and other values that differ between equal runs."""
    folder = out / NAMES[script]
    report = read_json(folder / "mnist_report.json")
    del report["seconds"], report["provenance"]["settings"]
    tensors = [read_tensors(folder / f"{name}.safetensors")[0] for name in ("network", "masks")]
    values = [{name: tensor.tolist() for name, tensor in one.items()} for one in tensors]
    files = sorted(path.name for path in folder.iterdir())
    return files, report, values, read_jsonl(folder / "metrics.jsonl"), read_json(folder / "edges_by_mask.json")


def at_step(monkeypatch, step, how):
    """Call `how` between step `step` of the run and its checkpoint. Returns a list with an entry for each step."""
    plain, counted = Checkpoints.after, []

    def after(self, *words):
        counted.append(words[0])
        if len(counted) == step:
            how()
        plain(self, *words)

    monkeypatch.setattr(Checkpoints, "after", after)
    return counted


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Pictures take most of the time and are not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (main, old):
            patch.setattr(script, "draw_run", lambda folder: [])
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    for script in (main, old):
        start(script, out)
    return {script: made(script, out) for script in (main, old)}


@pytest.mark.parametrize("script", [main, old], ids=NAMES.get)
def test_the_same_seed_gives_the_same_files_twice(whole, tmp_path, script):
    start(script, tmp_path)
    assert made(script, tmp_path) == whole[script]
    assert "checkpoints" not in whole[script][0]


@pytest.mark.parametrize(
    ("script", "step", "how"),
    # in the networks' training, between parts, in masks and fine-tuning; in greedy cuts
    [(main, step, die) for step in (3, 17, 20, 21, 38, 47, 53, 60, 88)]
    + [(main, step, stop) for step in (1, 20, 27, 58, 70)]
    + [(old, step, die) for step in (8, 20, 27, 38)]
    + [(old, step, stop) for step in (11, 29, 31)],
)
def test_an_interrupted_run_leaves_what_a_whole_one_does(whole, tmp_path, monkeypatch, script, step, how):
    with monkeypatch.context() as patch, pytest.raises(Killed if how is die else Stopped) as ended:
        at_step(patch, step, how)
        start(script, tmp_path)
    assert how is die or ended.value.exit_code == 75
    counted = at_step(monkeypatch, 0, die)
    start(script, tmp_path)
    assert made(script, tmp_path) == whole[script]
    assert STEPS[script] - step <= len(counted) <= STEPS[script] - step + 5  # little is done twice


@pytest.mark.parametrize("script", [main, old], ids=NAMES.get)
def test_damage_changed_settings_and_a_second_run(whole, tmp_path, monkeypatch, capsys, script):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 18, die)
        start(script, tmp_path)
    part = tmp_path / NAMES[script] / "checkpoints" / "network"
    assert (part / PREVIOUS).is_file()
    (part / NEWEST).write_bytes(b"damaged")
    start(script, tmp_path)
    said = capsys.readouterr().err
    assert "passed over a checkpoint" in said and "network: resuming from step 10" in said
    assert made(script, tmp_path) == whole[script]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 18, die)
        start(script, tmp_path)
    counted = at_step(monkeypatch, 0, die)
    start(script, tmp_path, train_lr=1e-3)
    assert (
        "other settings or data: starting from the beginning" in capsys.readouterr().err
        and len(counted) == STEPS[script]
    )
    with locked(tmp_path / NAMES[script]), pytest.raises(UserError, match="another run is writing"):
        start(script, tmp_path)
    assert signals._received is None  # signals are given back
