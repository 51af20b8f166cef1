"""The images of the MNIST setting: where they come from, how classes form groups, and which images play which part.

Three sources, tried in this order when the setting `source` is "auto": IDX files in a folder, the Hugging Face hub,
and the 8 x 8 digits that scikit-learn ships. The source used is part of every output, since figures of one do not
compare with those of another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.mnist.idx import read_idx
from circuit_breaking.mnist.settings import DEFAULT_FOLDER, Source
from circuit_breaking.runs.devices import pick_device
from circuit_breaking.runs.hub import hub_answers

HUB_NAME = "ylecun/mnist"
FILES = {
    ("train", "images"): "train-images",
    ("train", "labels"): "train-labels",
    ("test", "images"): "t10k-images",
    ("test", "labels"): "t10k-labels",
}


@dataclass
class Images:
    """Images as float32 rows [N, D], scaled to mean 0 and deviation 1 over the training pixels; labels int64 [N]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    side: int  # pixels a row
    source: str  # one line for people
    files: list[Path]

    @property
    def classes(self) -> list[int]:
        """The labels that training images have, in rising order. They may have gaps, or start at 1."""
        return self.train_y.unique().tolist()


@dataclass
class Split:
    """Groups, and the images by the part they play. Labels are groups from here on."""

    groups: list[list[int]]  # classes of each group; the last group has one class where their number is odd
    target_class: int  # the class whose grouping is the bad behaviour
    target_group: int
    mates: list[int]  # the other classes of the target's group
    side: int  # pixels a row of an image
    x: dict[str, Tensor]  # "train" and "test" -> images [N, D]
    y: dict[str, Tensor]  # "train" and "test" -> groups [N]
    train_is_target: Tensor  # [N] bool
    sets: dict[str, tuple[str, Tensor]]  # evaluation set -> "train" or "test", row numbers there
    reference: dict[str, Tensor] = field(default_factory=dict)  # "train" and "test" -> groups as a network that never
    # saw the target class gives them

    def pick(self, name: str) -> tuple[Tensor, Tensor]:
        """Images and groups of an evaluation set."""
        part, rows = self.sets[name]
        return self.x[part][rows], self.y[part][rows]

    @torch.no_grad()
    def accuracies(self, classify: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Share of each evaluation set that is classified as its group; `classify` maps images to groups.

        Where there is a reference network, also the share of the target's images that get its label, as the set's
        name with " as reference".
        """
        labels = {part: classify(x) for part, x in self.x.items()}
        shares = {}
        for name, (part, rows) in self.sets.items():
            shares[name] = labels[part][rows] == self.y[part][rows]
            if self.reference and name.endswith(" target"):
                shares[f"{name} as reference"] = labels[part][rows] == self.reference[part][rows]
        return {name: share.float().mean().item() for name, share in shares.items()}


def load_images(folder: Path, source: Source, device: torch.device | str, transpose: bool = False) -> Images:
    """Load the images on `device`.

    Args:
        folder: folder of IDX files.
        source: see the module's docstring.
        device: where the tensors are put, or the name of a device (`pick_device`), used once the files are read.
        transpose: swap rows and columns of each image; EMNIST's files hold images that lie on their side.

    Raises:
        UserError: the images are missing or damaged, or images and labels do not belong together.
    """
    arrays, files, name = _read(folder, source)
    if transpose:
        arrays = {key: array.swapaxes(1, 2).copy() if key[1] == "images" else array for key, array in arrays.items()}
        name += ", rows and columns swapped"
    return _images(arrays, files, name, pick_device(device) if isinstance(device, str) else device)


def _read(folder: Path, source: Source) -> tuple[dict[tuple[str, str], np.ndarray], list[Path], str]:
    """The arrays, the files they come from, and one line that says so."""
    if source == "idx" or (source == "auto" and (folder != DEFAULT_FOLDER or _find_any(folder))):
        return *_read_folder(folder), f"IDX files of {folder.name}/"
    if source != "digits":
        try:
            return _read_hub(), [], f"{HUB_NAME} on the Hugging Face hub"
        except UserError as error:
            if source == "hub":
                raise
            print(f"note: no IDX files in {folder}, and {error} Going on with scikit-learn's small digits instead.")
    return _read_digits(), [], "scikit-learn's bundled 8 x 8 digits (not MNIST)"


def _images(arrays: dict[tuple[str, str], np.ndarray], files: list[Path], source: str, device: torch.device) -> Images:
    """Check that images and labels belong together, then flatten and scale them."""
    for part in ("train", "test"):
        n_images, n_labels = len(arrays[part, "images"]), len(arrays[part, "labels"])
        if n_images != n_labels:
            raise UserError(f"{source}: {n_images:,} {part} images but {n_labels:,} {part} labels; they must agree.")
    sizes = [arrays[part, "images"].shape[1:] for part in ("train", "test")]
    if sizes[0] != sizes[1]:
        raise UserError(f"{source}: training images are {sizes[0]} pixels but test images {sizes[1]}; they must agree.")
    labels = {part: torch.from_numpy(arrays[part, "labels"].astype(np.int64)).to(device) for part in ("train", "test")}
    present = {part: set(found.tolist()) for part, found in labels.items()}
    if (extra := present["test"] - present["train"]) or len(present["train"]) < 3:
        what = f"test labels {sorted(extra)} that no training image has" if extra else "fewer than three classes"
        raise UserError(f"{source}: the labels hold {what}. Are the label files those of the image files?")
    pixels = {part: torch.from_numpy(arrays[part, "images"]).to(device).flatten(1) for part in ("train", "test")}
    train = pixels["train"].float()
    mean, deviation = train.mean(), train.std()
    if deviation == 0:
        raise UserError(f"{source}: all training pixels are equal, so there is nothing to learn. Check the files.")
    return Images(
        train_x=(train - mean) / deviation,
        train_y=labels["train"],
        test_x=(pixels["test"].float() - mean) / deviation,
        test_y=labels["test"],
        side=sizes[0][1],
        source=source,
        files=files,
    )


def _candidates(folder: Path, name: str, kind: str) -> list[Path]:
    """Names that the four files go by; uncompressed first."""
    stems = [f"{name}{mark}{ {'images': 'idx3', 'labels': 'idx1'}[kind] }-ubyte" for mark in "-."]
    return [folder / f"{stem}{end}" for end in ("", ".gz") for stem in stems]


def _find_any(folder: Path) -> bool:
    return any(path.is_file() for (_, kind), name in FILES.items() for path in _candidates(folder, name, kind))


def _read_folder(folder: Path) -> tuple[dict[tuple[str, str], np.ndarray], list[Path]]:
    arrays, files = {}, []
    for (part, kind), name in FILES.items():
        candidates = _candidates(folder, name, kind)
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(
                f"{folder} lacks {candidates[0].name} (.gz or not). Put the four IDX files there, point --data at their"
                f" folder, or use --source digits for scikit-learn's small ones."
            )
        arrays[part, kind] = read_idx(path, n_dims=3 if kind == "images" else 1)
        files.append(path)
    return arrays, files


def _read_hub() -> dict[tuple[str, str], np.ndarray]:
    """MNIST from the hub or its local cache. Without a network this fails after seconds, not after a minute."""
    from datasets import load_dataset  # slow to import, and only wanted here
    from huggingface_hub import snapshot_download

    online = hub_answers()
    try:
        folder = Path(
            snapshot_download(HUB_NAME, repo_type="dataset", allow_patterns="*.parquet", local_files_only=not online)
        )
        files = {part: [str(path) for path in sorted(folder.rglob(f"{part}-*.parquet"))] for part in ("train", "test")}
        arrays = {}
        for part in ("train", "test"):
            table = load_dataset("parquet", data_files=files, split=part).with_format("numpy")[:]
            arrays[part, "images"] = np.stack(list(table["image"])).astype(np.uint8)
            arrays[part, "labels"] = np.asarray(table["label"])
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if online else "the hub does not answer and nothing is cached"
        raise UserError(f"{HUB_NAME} cannot be had from the Hugging Face hub ({reason}).") from error
    return arrays


def _read_digits() -> dict[tuple[str, str], np.ndarray]:
    """1,797 digits of 8 x 8 pixels; a fixed third, drawn by chance, is the test set."""
    from sklearn.datasets import load_digits  # slow to import, and only wanted here

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    parts = {"test": order[: len(order) // 3], "train": order[len(order) // 3 :]}
    arrays = {(part, "images"): digits.images[rows].astype(np.uint8) for part, rows in parts.items()}
    return arrays | {(part, "labels"): digits.target[rows] for part, rows in parts.items()}


def split_images(images: Images, target_class: int, n_bad: int, seed: int) -> Split:
    """Pair the classes by chance, draw `n_bad` test images of the target class, and sort the rest for evaluation.

    The training images hold the target class too; whoever must not see it filters with `train_is_target`. Evaluation
    sets are named after their part: "target" is the target class, "other" every other class, "mates" the other
    members of the target's group. "test target" leaves out the `n_bad` examples.
    """
    classes = images.classes
    if target_class not in classes:
        names = f"{classes[0]} to {classes[-1]}"
        if len(classes) <= classes[-1] - classes[0]:
            names = ", ".join(map(str, classes))
        raise UserError(f"--target-class {target_class} is not one of the {len(classes)} classes {names}.")
    generator = torch.Generator().manual_seed(seed)
    # pairs of places among the classes that there are, not of labels, which may have gaps
    order = torch.randperm(len(classes), generator=generator).tolist()
    pairs = [sorted(order[start : start + 2]) for start in range(0, len(classes), 2)]
    groups = [[classes[at] for at in pair] for pair in pairs]
    group_at = torch.zeros(len(classes), dtype=torch.long)
    for number, pair in enumerate(pairs):
        group_at[pair] = number
    target_group = int(group_at[classes.index(target_class)])
    mates = [label for label in groups[target_group] if label != target_class]

    is_target = images.test_y == target_class
    targets = is_target.nonzero().flatten()
    if not 0 < n_bad < len(targets):
        raise UserError(
            f"--n-bad {n_bad} does not fit: the test set has {len(targets)} images of class {target_class}, and"
            f" at least one must be taken and one held out."
        )
    if untested := [mate for mate in mates if not (images.test_y == mate).any()]:
        raise UserError(
            f"{images.source}: no test image has the label {untested[0]}, which shares the group of {target_class} with"
            f" --seed {seed}. Give another seed, or test images of every class."
        )
    targets = targets[torch.randperm(len(targets), generator=generator).to(targets.device)]
    bad, held_out = targets[:n_bad], targets[n_bad:]

    device = images.train_y.device
    labels, group_at = torch.tensor(classes, device=device), group_at.to(device)
    train_is_target = images.train_y == target_class
    sets = {
        "bad examples": ("test", bad),
        "test target": ("test", held_out),
        "train target": ("train", train_is_target.nonzero().flatten()),
        "test other": ("test", (~is_target).nonzero().flatten()),
        "train other": ("train", (~train_is_target).nonzero().flatten()),
    }
    if mates:
        wanted = torch.tensor(mates, device=device)
        sets["test mates"] = ("test", torch.isin(images.test_y, wanted).nonzero().flatten())
        sets["train mates"] = ("train", torch.isin(images.train_y, wanted).nonzero().flatten())
    return Split(
        groups=groups,
        target_class=target_class,
        target_group=target_group,
        mates=mates,
        side=images.side,
        x={"train": images.train_x, "test": images.test_x},
        y={
            "train": group_at[torch.searchsorted(labels, images.train_y)],
            "test": group_at[torch.searchsorted(labels, images.test_y)],
        },
        train_is_target=train_is_target,
        sets=sets,
    )
