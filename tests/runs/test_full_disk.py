"""Full and read-only disks, folders locked by another run: one sentence, earlier results intact, no file left over."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.forks import Forked
from helpers.scripts import PLAIN, RUDE, called, load_script, save_small_model

from circuit_breaking.errors import UserError
from circuit_breaking.runs import files, tensors
from circuit_breaking.runs.checkpoints import NEWEST, PREVIOUS, Checkpoints
from circuit_breaking.runs.files import ROOT, write_csv, write_json, write_jsonl, write_text
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.tensors import write_tensors

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")
WRITERS = {
    "text": lambda path, n: write_text(path, f"{n}" * 9),
    "json": lambda path, n: write_json(path, {"a": n}),
    "lines": lambda path, n: write_jsonl(path, [{"a": n}] * 9),
    "table": lambda path, n: write_csv(path, [{"a": n}] * 9),
    "tensors": lambda path, n: write_tensors(path, {"a": torch.full((9,), float(n))}),
}
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]


class Disk:
    """Fails from its k-th operation on: making, writing, writing through, renaming a file. `count`: how many so far."""

    def __init__(self, monkeypatch, fail_at, code=errno.ENOSPC):
        self.count, self.fail_at, self.code = 0, fail_at, code
        monkeypatch.setattr(files.tempfile, "mkstemp", self.watched(tempfile.mkstemp))
        monkeypatch.setattr(files.os, "fsync", self.watched(os.fsync))
        monkeypatch.setattr(Path, "replace", self.watched(Path.replace))
        monkeypatch.setattr(Path, "write_text", self.watched(Path.write_text))
        monkeypatch.setattr(tensors, "save_file", self.watched(tensors.save_file))

    def watched(self, call):
        def watching(*words, **keywords):
            self.count += 1
            if self.fail_at is not None and self.count >= self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return call(*words, **keywords)

        return watching


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_every_writer_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, writer, code):
    path = tmp_path / "file"
    writer(path, 1)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        disk = Disk(patch, None)
        writer(path, 1)
    for k in range(1, disk.count + 1):
        with monkeypatch.context() as patch:
            Disk(patch, k, code)
            with pytest.raises(UserError, match=f"cannot write .*{os.strerror(code)}") as error:
                writer(path, 2)
        assert "\n" not in str(error.value)
        assert content(tmp_path) == before
    writer(path, 2)
    assert content(tmp_path).keys() == before.keys() and content(tmp_path) != before


def test_checkpoints_on_a_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {"seed": 0})
    for step in (1, 2):
        checkpoints.save(step, {"x": torch.full((3,), float(step))}, {})
    with monkeypatch.context() as patch:
        disk = Disk(patch, None)
        checkpoints.save(3, {"x": torch.full((3,), 3.0)}, {})
    assert checkpoints.load().step == 3
    for k in range(1, disk.count + 1):
        with monkeypatch.context() as patch:
            Disk(patch, k)
            with pytest.raises(UserError, match="No space left"):
                checkpoints.save(4, {"x": torch.full((3,), 4.0)}, {})
        assert set(content(tmp_path)) <= {NEWEST, PREVIOUS}
        saved = checkpoints.load()
        assert saved.step == 3 and torch.equal(saved.tensors["x"], torch.full((3,), 3.0))


# The scripts, with a model that takes no time


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_small_model(folder / "model", n_layer=2, n_head=2, n_embd=8)
    for name, texts in (("train", RUDE[:60]), ("test", RUDE[100:110])):
        rows = [{"id": i, "text": text} for i, text in enumerate(texts, 1000 * (name == "test"))]
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "plain.txt").write_text("\n".join(PLAIN[:60]))
    return folder


def options(inputs, out, **more):
    return {
        "model": str(inputs / "model"), "toxic_train": inputs / "train.jsonl", "toxic_test": inputs / "test.jsonl",
        "ordinary": str(inputs / "plain.txt"), "out": out, "run": "run", "device": "cpu", **more,
    }  # fmt: skip


def training(inputs, out, **more):
    quick = {"steps": 3, "refine_rounds": 1, "constants_steps": 1, "num_texts": 4, "max_edges": 3}
    return options(inputs, out, **quick, checkpoint_every=2, **more)


def evaluating(inputs, out, **more):
    quick = {"num_texts": 4, "num_prompts": 2, "samples": 1, "new_tokens": 2, "num_uniform": 0}
    return options(inputs, out, scorer="profanity-check", **quick, **more)


SCRIPTS = {"train_mask": training, "evaluation": evaluating}


def restore(folder, kept):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    for name, data in kept.items():
        (folder / name).write_bytes(data)


def same_run(name, data):
    """What of a file does not change from run to run: all but times."""
    if name == "metrics.jsonl":
        return [{**json.loads(line), "seconds": 0} for line in data.decode().splitlines()]
    return data


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_on_a_disk_that_fills_at_any_moment(inputs, finished, tmp_path, monkeypatch, capsys, name, every):
    """The disk is full from the k-th operation on, for every k, or for every seventh and the last."""
    script, run = load_script(f"toxicity/{name}.py"), a_run(finished, tmp_path, name)
    before = content(run)
    again = script.Settings(**SCRIPTS[name](inputs, tmp_path, seed=1))
    with monkeypatch.context() as patch:
        disk = Disk(patch, None)
        script.main(again)
    after = content(run)
    assert disk.count > 5
    for k in {*range(1, disk.count + 1, every), disk.count}:
        restore(run, before)
        with monkeypatch.context() as patch:
            Disk(patch, k)
            with pytest.raises(UserError, match="No space left") as error:
                script.main(again)
        assert "\n" not in str(error.value)
        there = content(run)
        assert there.keys() >= before.keys() - {NEWEST, PREVIOUS}
        for file, data in there.items():
            if file in (".lock", NEWEST, PREVIOUS):
                continue
            if file == "metrics.jsonl":  # grows as the run goes
                rows, whole = same_run(file, data), same_run(file, after[file])
                assert rows == same_run(file, before[file]) or rows == whole[: len(rows)], (k, file)
            else:
                assert data in (before.get(file), after.get(file)), (k, file)
    # the first file to be written shows that nothing was touched before
    restore(run, before)
    with monkeypatch.context() as patch:
        Disk(patch, 1)
        with pytest.raises(UserError):
            script.main(again)
    assert content(run) == before
    capsys.readouterr()


def words_of(settings):
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def limited(path, words, most):
    """Exit code and output of a script under a kernel that lets no file grow beyond `most` bytes."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as out:  # noqa: PTH123
        with open(writer, "w", encoding="utf-8") as file:  # noqa: PTH123
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
            process = Forked([sys.executable, ROOT / path, *words], os.environ, file, prepare=limit)
        return out.read(), process.wait()


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A folder with the run folder of a training and its evaluation."""
    out = tmp_path_factory.mktemp("finished")
    for name, settings in SCRIPTS.items():
        script = load_script(f"toxicity/{name}.py")
        script.main(script.Settings(**settings(inputs, out)))
    return out


def a_run(finished, out, name):
    """The run folder of `finished`, copied; for `train_mask` without the files of the evaluation."""
    run = shutil.copytree(finished / "run", out / "run")
    if name == "train_mask":
        for path in run.iterdir():
            if path.name in ("report.json", "report.png", "training.png"):
                path.unlink()
    return run


@pytest.mark.parametrize("name, most", [("train_mask", 100), ("train_mask", 4500), ("evaluation", 100)])
def test_the_kernel_refuses_to_write(inputs, finished, tmp_path, name, most):
    run = a_run(finished, tmp_path, name)
    before = content(run)
    words = words_of(SCRIPTS[name](inputs, tmp_path, seed=1))
    output, code = limited(f"toxicity/{name}.py", words, most)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "Traceback" not in output
    assert "cannot write" in errors[0] and "File too large" in errors[0]
    there = content(run)
    assert there.keys() ^ before.keys() <= {NEWEST, PREVIOUS}
    kept = before.keys() if most == 100 else {"mask.safetensors", "edges.json"}
    assert {file: there[file] for file in kept} == {file: before[file] for file in kept}
    json.loads(there["settings.json"])
    same_run("metrics.jsonl", there["metrics.jsonl"])


def test_a_small_disk_that_is_really_full(tmp_path):
    """On a file system of 64 KB, in a separate mount namespace; where none can be made, the tests above stand in."""
    code = (
        "import sys; from pathlib import Path; from circuit_breaking.runs.tensors import *; import torch\n"
        "from circuit_breaking.errors import UserError\n"
        "write_tensors(sys.argv[1] + '/mask', {'a': torch.ones(4000)})\n"
        "print('first', flush=True)\n"
        "try: write_tensors(sys.argv[1] + '/mask', {'a': torch.zeros(40000)})\n"
        "except UserError as error: print(error)\n"
        "left = sorted(path.name for path in Path(sys.argv[1]).iterdir())\n"
        "print(left, read_tensors(sys.argv[1] + '/mask')[0]['a'].sum())"
    )
    mount = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", tmp_path, sys.executable, code],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if "first" not in done.stdout:
        assert "Traceback" not in done.stderr
        pytest.skip("no file system can be mounted here")
    lines = done.stdout.splitlines()
    assert "No space left" in lines[1] and lines[2] == "['mask'] tensor(4000.)"


READ_ONLY = [Path("/proc/nothing"), Path("/sys/nothing")]


@pytest.mark.parametrize("out", READ_ONLY)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_made(inputs, finished, name, out):
    script = load_script(f"toxicity/{name}.py")
    mask = {} if name == "train_mask" else {"mask": finished / "run" / "mask.safetensors"}
    with pytest.raises(UserError, match=f"cannot write {out}"):
        script.main(script.Settings(**SCRIPTS[name](inputs, out, **mask)))


def test_a_file_where_the_folder_should_be(inputs, tmp_path):
    (tmp_path / "run").write_text("mine")
    for name, settings in SCRIPTS.items():
        script = load_script(f"toxicity/{name}.py")
        with pytest.raises(UserError):
            script.main(script.Settings(**settings(inputs, tmp_path)))
    assert content(tmp_path) == {"run": b"mine"}


def test_a_second_run_in_the_same_folder_is_refused(inputs, finished, tmp_path):
    train = load_script("toxicity/train_mask.py")
    before = content(a_run(finished, tmp_path, "train_mask"))
    with locked(tmp_path / "run"):
        done = called("toxicity/train_mask.py", *words_of(training(inputs, tmp_path, seed=1)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: another run is writing to")
    assert content(tmp_path / "run") == before
    train.main(train.Settings(**training(inputs, tmp_path, seed=1)))
    assert content(tmp_path / "run") != before
