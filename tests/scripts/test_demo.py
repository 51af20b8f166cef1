"""What `make demo` promises: few edges cut, most of the toxicity gone, ordinary text as before."""

import json

import pytest
from helpers.scripts import command, load_script

from circuit_breaking.errors import UserError
from circuit_breaking.models.load import TINY


@pytest.mark.slow
@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in data/tiny_gpt2")
def test_the_demo_keeps_its_promises(tmp_path):
    done = command("toxicity/demo.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    before, after = report["models"]["original"], report["models"]["ablated"]
    assert 1 <= after["edges_cut"] <= 12
    toxic = [one["continuations"]["toxic"]["toxic_share"]["value"] for one in (before, after)]
    assert toxic[0] >= 0.8 and toxic[1] <= 0.3 * toxic[0]
    assert after["losses"]["ordinary"]["change"]["value"] <= 0.1
    assert f"{after['edges_cut']} edges cut" in done.stdout and str(tmp_path / "demo") in done.stdout


def test_a_part_that_fails_ends_the_demo(tmp_path, capfd):
    demo = load_script("toxicity/demo.py")
    with pytest.raises(UserError, match=r"toxicity/train_mask.py ended with exit code 1; what it said above"):
        demo.main(demo.Settings(out=tmp_path, device="gpu"))
    assert "evaluation.py" not in capfd.readouterr().out
