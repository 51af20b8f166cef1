"""IDX files: what is read, and the one clear sentence for each way in which a file can be wrong."""

import gzip
import struct

import numpy as np
import pytest
import torch

from circuit_breaking.errors import UserError
from circuit_breaking.mnist import digits
from circuit_breaking.mnist.digits import load_images, split_images
from circuit_breaking.mnist.idx import read_idx

CPU = torch.device("cpu")


def idx_bytes(array):
    """Our own IDX writer, the oracle of the reader."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(folder, packed=False, n=(60, 40), side=6, change=None):
    """A small IDX data set of ten classes; `change` maps a file's stem to other bytes."""
    generator = np.random.default_rng(0)
    for part, count in zip(("train", "t10k"), n, strict=True):
        images = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for stem, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = (change or {}).get(stem, idx_bytes(array))
            path = folder / (stem + (".gz" if packed else ""))
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_values_come_back(tmp_path, packed):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(idx_bytes(images)) if packed else idx_bytes(images))
    assert (read_idx(path, 3) == images).all()


GOOD = idx_bytes(np.arange(60, dtype=np.uint8).reshape(5, 3, 4))
HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1)
BIG = bytes([0, 0, 8, 3]) + struct.pack(">3I", 1_000_000, 28, 28)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (GOOD[:3], "not an IDX file"),
        (GOOD[:9], "ends inside its header"),
        (GOOD[:-1], "truncated"),
        (GOOD + b"x", "longer than"),
        (b"\0\0\x0d\x03" + GOOD[4:], "0x0d"),
        (idx_bytes(np.arange(5, dtype=np.uint8)), "holds labels"),
        (idx_bytes(np.zeros((2, 2), np.uint8)), "2-dimensional"),
        (idx_bytes(np.zeros((0, 28, 28), np.uint8)), "is empty"),
        (HUGE, "more than the"),
        (BIG, "truncated"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_wrong_content_is_one_sentence(tmp_path, content, says, packed):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=says) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_where_labels_should_be(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(GOOD)
    with pytest.raises(UserError, match="should hold labels but holds images"):
        read_idx(path, 1)


def test_damaged_gzip(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    whole = gzip.compress(idx_bytes(images))
    path = tmp_path / "images.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short inside its gzip data"):
        read_idx(path, 3)
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])  # another checksum
    with pytest.raises(UserError, match="damaged gzip"):
        read_idx(path, 3)
    path.write_bytes(whole[:2000] + bytes(2000) + whole[4000:])
    with pytest.raises(UserError):
        read_idx(path, 3)
    path.write_bytes(idx_bytes(images))
    with pytest.raises(UserError, match="not gzip-compressed"):
        read_idx(path, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_huge_header_takes_no_memory(tmp_path, packed):
    import tracemalloc

    claimed = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**20, 28, 28)  # 822 MB, under the limit
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(claimed + bytes(100)) if packed else claimed + bytes(100))
    tracemalloc.start()
    with pytest.raises(UserError, match="truncated"):
        read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize("packed", [False, True])
def test_folder_of_any_idx_data_set(tmp_path, packed):
    images = load_images(write_set(tmp_path, packed), "auto", CPU)
    assert images.train_x.shape == (60, 36)
    assert images.side == 6
    assert len(images.files) == 4
    assert images.train_x.mean().abs() < 1e-5
    assert abs(images.train_x.std() - 1) < 1e-5


@pytest.mark.parametrize(
    ("stem", "content", "says"),
    [
        ("train-labels-idx1-ubyte", idx_bytes(np.arange(59, dtype=np.uint8) % 10), "60 train images but 59 train lab"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.arange(60, dtype=np.uint8) % 10), "40 test images but 60 test labels"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((40, 5, 6), np.uint8)), "must agree"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.full(40, 77, np.uint8)), r"\[77\] that no training image has"),
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(60, np.uint8)), "labels"),
        ("train-images-idx3-ubyte", idx_bytes(np.zeros((60, 6, 6), np.uint8)), "all training pixels are equal"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, stem, content, says):
    with pytest.raises(UserError, match=says):
        load_images(write_set(tmp_path, change={stem: content}), "auto", CPU)


def test_incomplete_and_missing_folders(tmp_path):
    with pytest.raises(UserError, match="lacks train-images"):
        load_images(tmp_path / "nowhere", "auto", CPU)
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="lacks t10k-labels"):
        load_images(tmp_path, "auto", CPU)


def test_without_files_or_hub_the_small_digits_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "DEFAULT_FOLDER", tmp_path)
    monkeypatch.setattr(digits, "hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    images = load_images(tmp_path, "auto", CPU)
    assert "not MNIST" in images.source
    assert "the hub does not answer" in capsys.readouterr().out
    with pytest.raises(UserError, match="hub does not answer"):
        load_images(tmp_path, "hub", CPU)


def test_hub_copy_is_read(tmp_path, monkeypatch):
    """The hub's layout (parquet files, an image and a label column), in a folder that we made."""
    import datasets
    import huggingface_hub
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = {"image": [Image.fromarray(image) for image in pixels], "label": [i % 10 for i in range(20)]}
    for part in ("train", "test"):
        made = datasets.Dataset.from_dict(table, features=columns)
        made.to_parquet(tmp_path / "mnist" / f"{part}-00000-of-00001.parquet")
    monkeypatch.setattr(digits, "hub_answers", lambda: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arrays = digits._read_hub()
    assert (arrays["train", "images"] == pixels).all()
    assert arrays["test", "labels"].tolist() == table["label"]


def test_parts_of_a_split_are_disjoint():
    images = load_images(digits.DEFAULT_FOLDER, "digits", CPU)
    split = split_images(images, 3, 30, seed=1)
    assert sorted(label for group in split.groups for label in group) == list(range(10))
    assert 3 in split.groups[split.target_group]
    sizes = {name: len(rows) for name, (_, rows) in split.sets.items()}
    assert sizes["bad examples"] == 30
    assert sizes["bad examples"] + sizes["test target"] + sizes["test other"] == len(images.test_x)
    assert sizes["train target"] + sizes["train other"] == len(images.train_x)
    bad = {row.numpy().tobytes() for row in split.pick("bad examples")[0]}
    assert not bad & {row.numpy().tobytes() for row in split.pick("test target")[0]}
    again = split_images(images, 3, 30, seed=1)
    assert torch.equal(split.pick("bad examples")[0], again.pick("bad examples")[0])
    with pytest.raises(UserError, match="--target-class 10 is not one of the 10"):
        split_images(images, 10, 30, seed=0)
    with pytest.raises(UserError, match="--n-bad 66 does not fit"):
        split_images(images, 3, sizes["bad examples"] + sizes["test target"], seed=0)


def labels_as(mapping, n=(60, 40)):
    """Label files whose classes are those of `mapping`, in turn."""
    return {
        f"{part}-labels-idx1-ubyte": idx_bytes(np.array([mapping[i % len(mapping)] for i in range(count)], np.uint8))
        for part, count in zip(("train", "t10k"), n, strict=True)
    }


@pytest.mark.parametrize("classes", [[1, 2, 3, 4, 5, 6], [0, 3, 4, 7, 200], [3, 9, 11]])
def test_labels_with_gaps_make_pairs_of_the_classes_that_there_are(tmp_path, classes):
    images = load_images(write_set(tmp_path, change=labels_as(classes)), "auto", CPU)
    assert images.classes == classes
    for seed in range(6):
        split = split_images(images, 3, 2, seed)
        assert sorted(label for group in split.groups for label in group) == classes
        assert len(split.groups) == (len(classes) + 1) // 2 and 3 in split.groups[split.target_group]
        for part, labels in (("train", images.train_y), ("test", images.test_y)):
            expected = [next(g for g, group in enumerate(split.groups) if label in group) for label in labels.tolist()]
            assert split.y[part].tolist() == expected
        accuracies = split.accuracies(lambda x: torch.zeros(len(x), dtype=torch.long))
        assert all(0 <= share <= 1 for share in accuracies.values())  # no set is empty
    for absent in (-1, 8, 201):
        with pytest.raises(UserError, match=rf"--target-class {absent} is not one of the {len(classes)} classes"):
            split_images(images, absent, 2, 0)


def test_pairs_of_ten_classes_are_those_of_before():
    images = load_images(digits.DEFAULT_FOLDER, "digits", CPU)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    assert split_images(images, 3, 30, 0).groups == [sorted(order[i : i + 2]) for i in range(0, 10, 2)]


def test_classes_too_few_or_without_test_images_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="fewer than three classes"):
        load_images(write_set(tmp_path, change=labels_as([5, 9])), "auto", CPU)
    change = labels_as([1, 2, 3, 4])
    change["t10k-labels-idx1-ubyte"] = labels_as([2, 3, 3, 4])["t10k-labels-idx1-ubyte"]
    images = load_images(write_set(tmp_path, change=change), "auto", CPU)
    refusals = []
    for seed in range(20):
        try:
            split_images(images, 3, 2, seed)
        except UserError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 20 and all("no test image has the label 1" in text for text in refusals)


def test_transposed_images_are_turned(tmp_path):
    folder = write_set(tmp_path)
    plain, turned = (load_images(folder, "auto", CPU, transpose) for transpose in (False, True))
    for before, after in ((plain.train_x, turned.train_x), (plain.test_x, turned.test_x)):
        assert torch.equal(before.reshape(-1, 6, 6).transpose(1, 2), after.reshape(-1, 6, 6))
    assert plain.source != turned.source  # so that a network of one is not used on the other
