"""The benchmarks run, on a shape that takes seconds, and what they say is right."""

import pytest
from helpers.scripts import load_script

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
