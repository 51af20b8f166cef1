"""The benchmarks run, on a shape that takes seconds, and their figures are right."""

import os

import pytest
from helpers.scripts import command, load_script

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import read_json


def test_families_gathers_rows(tmp_path, capsys):
    families = load_script("benchmarks/families.py")
    out = tmp_path / "families.json"
    for shapes, rounds in ((("tiny",), 1), (("pythia-70m",), 0)):
        families.main(families.Settings(shapes=shapes, batch=2, length=8, rounds=rounds, cut=5, device="cpu", out=out))
    rows = read_json(out)["rows"]
    assert set(rows) == {"tiny", "pythia-70m"}
    assert rows["tiny"]["edges"] == 26 and rows["tiny"]["edges_split"] == 46 and rows["tiny"]["plain"] > 0
    assert rows["pythia-70m"]["edges"] == 1324 and "plain" not in rows["pythia-70m"]
    assert all(row["difference"] < 1e-4 and row["difference_cut"] < 1e-4 for row in rows.values())
    assert "pythia-70m" in capsys.readouterr().out
    with pytest.raises(UserError, match="shape 'gpt5' is not one of tiny, gpt2"):
        families.main(families.Settings(shapes=("gpt5",), out=out))


def test_rounding_is_that_of_the_whole_model(tmp_path, capsys):
    rounding = load_script("benchmarks/rounding.py")
    out = tmp_path / "rounding.json"
    rounding.main(rounding.Settings(shares=(0.0, 0.1, 0.99), out=out))
    errors = read_json(out)["errors"]
    assert list(errors) == ["bfloat16", "float16", "float32"] and "engine" not in errors["float16"]["0.0%"]
    for rows in errors.values():
        assert [row["edges"] for row in rows.values()][:3] == [0, 21, 205]
        whole, *others = rows.values()
        assert list(rows)[3].startswith("all of ") and 0 < rows[list(rows)[3]]["edges"] < 205
        assert all(row[name] < 6 * whole[name] + 1e-12 for row in others for name in row.keys() - {"edges"})
    assert "KL divergence from float64" in capsys.readouterr().out
    with pytest.raises(UserError, match="between 0 and 1"):
        rounding.main(rounding.Settings(shares=(2.0,), out=out))


def test_first_position_measures_each_way(tmp_path, capsys):
    first = load_script("benchmarks/first_position.py")
    out = tmp_path / "first.json"
    first.main(first.Settings(cuts=("m0->m1", "m0"), num_means=8, num_test=6, length=12, device="cpu", out=out))
    found = read_json(out)
    rises = found["rises"]
    assert list(rises) == ["m0->m1", "m0"] and all(list(row) == list(first.WAYS) for row in rises.values())
    assert all(len(set(row.values())) == len(row) for row in rises.values())  # no two ways are the same
    assert found["norm_at_first"] > 0 and found["largest"] in capsys.readouterr().out


@pytest.mark.parametrize("split", [False, True])
def test_computed_weights_are_those_of_the_model(split):
    memory, steps = load_script("benchmarks/memory.py"), load_script("benchmarks/steps.py")
    model = load_model(steps.make_hf_of(steps.SHAPES["tiny"], "cpu", "float32"), split, "cpu", offload=True)
    packed = sum(tensor.nbytes for block in model.blocks for tensor in block.buffers())
    outer = {tensor.data_ptr(): tensor.nbytes for tensor in (model.embedding, model.unembedding, model.positions)}
    found = memory.computed("tiny", "float32", 3, 8, False, split)
    assert round(found["weights"] * 1e9) == packed + sum(outer.values())
    assert found["offloaded"] == found["weights"]  # both layers are on the device
    four = memory.computed("tiny", "float32", 3, 8, False, split, layers=4)
    assert round(four["weights"] * 1e9) == 2 * packed + sum(outer.values()) and four["offloaded"] == found["weights"]


def test_memory_says_what_fits(tmp_path, capsys):
    memory = load_script("benchmarks/memory.py")
    out = tmp_path / "memory.json"
    memory.main(memory.Settings(shapes=("tiny",), sizes=("2 x 8",), limit_gb=0, gpus=(0.02, 0.2), out=out))
    results = read_json(out)
    assert [row["measured"] for row in results["rows"]] == [None] * 4
    for row in results["fits"]:
        for name, (recompute, offload) in memory.WAYS.items():
            for texts, fit in ((row[name], True), (row[name] + 1, False)):
                need = memory.computed("tiny", row["dtype"], texts, memory.TEXT, recompute, False)
                total = need["offloaded" if offload else "weights"] + need["step"]
                assert (total <= 0.9 * row["gb"]) == fit
    assert "0.02 GB" in capsys.readouterr().out
    with pytest.raises(UserError, match="'gpt5' is not one of tiny, gpt2"):
        memory.main(memory.Settings(shapes=("gpt5",), out=out))
    with pytest.raises(UserError, match="is not a number of texts"):
        memory.main(memory.Settings(shapes=("tiny",), sizes=("2x",), out=out))


@pytest.mark.slow
def test_a_model_of_a_billion_and_a_half_loads_and_takes_a_step_without_a_second_copy(tmp_path):
    """From seven files in bfloat16, as GPT-2 XL: on two cores with 24 GB of memory."""
    out = command("benchmarks/loading.py", "--dtypes", "bfloat16", "--out", tmp_path / "loading.json")
    assert out.returncode == 0, out.stderr
    (row,) = read_json(tmp_path / "loading.json")["rows"]
    assert row["load_peak"] + row["step_peak"] < 24
    # what is not a page of the files: folded queries, keys and values, and what a step computes
    assert row["load_private"] < 0.4 * row["weights"]
    assert row["step_private"] < 0.3 * row["weights"]


def test_operations_are_those_of_the_products(tmp_path, capsys):
    operations = load_script("benchmarks/operations.py")
    out, tokens, width = tmp_path / "operations.json", 2 * 8, 32
    settings = {"shapes": ("tiny",), "batch": 2, "length": 8, "dtype": "float32", "out": out}
    operations.main(operations.Settings(**settings, tflops=1e-6, copy_gbps=1e-5))
    results = read_json(out)
    (row,) = results["rows"]
    assert row["mask"] == pytest.approx(3 * 2 * 26 * tokens * width / 1e12)  # 26 edges
    assert row["logits"] == pytest.approx(2 * 2 * 100 * tokens * width / 1e12)
    matrices = 2 * 12 * width**2  # two layers: queries, keys, values and output, and an MLP of four times the width
    assert 1 < row["layers"] * 1e12 / (2 * 2 * matrices * tokens) < 1.05  # biases and norms are counted too
    assert row["seconds"] == pytest.approx(sum(row[name] for name in ("layers", "mask", "logits")) / 1e-6)
    assert row["offloaded"] == row["copied_gb"] / 1e-5 > row["recomputing"] > row["seconds"]
    operations.main(operations.Settings(**settings, measured_shape="tiny", measured_ms=1000.0))
    assert read_json(out)["tflops"] > 0 and "Computed" in capsys.readouterr().out
    with pytest.raises(UserError, match="'gpt5' is not one of tiny"):
        operations.main(operations.Settings(shapes=("gpt5",), out=out))


def test_a_process_that_dies_is_an_error():
    steps = load_script("benchmarks/steps.py")
    with pytest.raises(UserError, match="the process that measures was ended"):
        steps.in_new_process(os._exit, 1)
