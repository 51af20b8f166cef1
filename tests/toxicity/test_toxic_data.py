"""Drawing posts from a dump: what is drawn, what is counted, and every way in which a dump can be bad."""

import json
import random
import tarfile
from collections import Counter

import pytest
from helpers.dumps import FILES, SAMPLE, SCRIPT, Settings, ndjson, post, random_threads, run, script, tar, zst
from helpers.scripts import command
from hypothesis import given
from hypothesis import strategies as st

from circuit_breaking.errors import UserError
from circuit_breaking.toxicity.sampling import SmallestKeys, normalised, text_key


@pytest.fixture(scope="module")
def data():
    return ndjson(random_threads(3000))


def test_sets_are_what_they_promise(tmp_path, data):
    sizes = {"n_train": 60, "n_test": 30, "n_uniform": 500}
    rows, report = run(tmp_path, data, **sizes)
    assert {name: len(r) for name, r in rows.items()} == {"train": 60, "test": 30, "uniform": 500}
    everything = [row for name in rows for row in rows[name]]
    assert len({row["id"] for row in everything}) == len({normalised(row["text"]) for row in everything}) == 590
    assert all(0.9 <= row["toxicity"] <= 1 for row in rows["train"] + rows["test"])
    assert Counter(int(row["toxicity"] * 10) for row in rows["uniform"]) == dict.fromkeys(range(10), 50)
    for row in rows["train"]:  # shuffled: neither sorted by id nor by score
        assert list(row) == ["id", "text", "toxicity"]
    for column in ("id", "toxicity"):
        assert [row[column] for row in rows["train"]] != sorted(row[column] for row in rows["train"])
    assert report["counts"]["usable"] == report["counts"]["posts"] == sum(report["usable_per_bin"]) == 3000
    assert report["sets"]["uniform"] == {"wanted": 500, "got": 500, "rows_per_bin": [50] * 10}
    assert report["settings"]["seed"] == 0 and report["inputs"] and report["packages"]


def test_drawn_as_an_oracle_draws_that_sees_everything(tmp_path):
    threads = random_threads(2000)
    rng = random.Random(1)
    for thread in threads:  # a third of the posts share 40 texts, written in several ways, at any toxicity
        for p in thread["posts"]:
            if rng.random() < 0.33:
                p["com"] = rng.choice([str.upper, str.lower])(f"the  same text {rng.randrange(40)}") + "&amp; more"
    rows, report = run(tmp_path, ndjson(threads), n_train=40, n_test=20, n_uniform=200, n_bins=5, seed=7)

    posts = sorted((p for t in threads for p in t["posts"]), key=lambda p: p["no"])
    first = {}
    for p in posts:
        first.setdefault(normalised(p["com"].replace("&amp;", "&")), p)
    ordered = [first[text] for text in sorted(first, key=lambda text: text_key(text, 7))]
    band = [p["no"] for p in ordered if p["perspectives"]["TOXICITY"] >= 0.9]
    rest = [p for p in ordered if p["no"] not in band[:60]]
    uniform = [
        p["no"]
        for low in range(5)
        for p in [p for p in rest if low <= p["perspectives"]["TOXICITY"] * 5 < low + 1][:40]
    ]
    assert [row["id"] for row in rows["train"]] == band[:40]
    assert [row["id"] for row in rows["test"]] == band[40:60]
    assert sorted(row["id"] for row in rows["uniform"]) == sorted(uniform)
    assert report["counts"]["duplicate_texts_among_candidates"] == len(posts) - len(first)


def contents(folder):
    return {name: (folder / "out" / name).read_bytes() for name in FILES}


def test_same_seed_same_files_whatever_the_order_and_the_container(tmp_path, data):
    half = data.index(b"\n", len(data) // 2) + 1
    lines = data.splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    parts = {"a/README.md": b"about", "a/._x.ndjson": b"\0" * 99, "a/x.ndjson": data[:half], "b.ndjson": data[half:]}
    forms = {
        "plain": data,
        "no line end": data[:-1],
        "shuffled": b"".join(lines),
        "byte order mark, blank lines": b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\n", 3),
        "zst": zst(data),
        "frames": skippable + zst(data[:half]) + skippable + zst(b"") + zst(data[half:]),
        "tar": tar(parts),
        "tar.zst": zst(tar(parts, format=tarfile.PAX_FORMAT)),
        "long names": zst(tar({"d/" * 90 + "x.ndjson": data}, format=tarfile.GNU_FORMAT)),
    }
    sizes = {"n_train": 60, "n_test": 30, "n_uniform": 100}
    _, report = run(tmp_path / "reference", data, **sizes)
    for name, form in forms.items():
        run(tmp_path / name, form, **sizes)
        assert contents(tmp_path / name) == contents(tmp_path / "reference"), name
    before = (tmp_path / "reference" / "out" / "report.json").read_bytes()
    assert run(tmp_path / "reference", data, **sizes)[1] == report
    assert (tmp_path / "reference" / "out" / "report.json").read_bytes() == before
    run(tmp_path / "seed", data, seed=1, **sizes)
    assert all(contents(tmp_path / "seed")[n] != contents(tmp_path / "reference")[n] for n in FILES)


def test_every_kind_of_bad_line_and_post_is_counted(tmp_path, capsys):
    good = "some mild words number "
    posts = [
        *(post(i, good + str(i), i / 100) for i in range(1, 100)),
        *("text", None, 5, [], {}, {"no": "7"}, post(True, good, 0.5), post(-1, good, 0.5), post(2**63, good, 0.5)),
        *(post(200, 5, 0.5), post(201, ["x"], 0.5), {"no": 202, "com": good, "perspectives": [0.5]}),
        *(post(210, None, 0.5), post(211, "", 0.5), {"no": 212, "perspectives": {"TOXICITY": 0.5}}),
        *({"no": 220, "com": good}, {"no": 221, "com": good, "perspectives": None}, post(222, good, None)),
        {"no": 223, "com": good, "perspectives": {}},
        *(post(230 + i, good, s) for i, s in enumerate([float("nan"), float("inf"), -0.1, 1.1, "0.5", True, [0.5]])),
        post(240, "x" * 70_000, 0.5),
        *(post(250, "<br> <br>", 0.5), post(251, '<a class="quotelink">&gt;&gt;12345678</a>', 0.5)),
        post(260, "short", 0.5),
        *(post(270, (good + "7").upper(), 0.5), post(1, good + "of a second text", 0.99)),
    ]
    bad = [
        *(
            b"{",
            b"[]",
            b"5",
            b"null",
            b'"x"',
            b"{}",
            b'{"posts": null}',
            b'{"posts": {}}',
            b'{"posts": [{"com": "\x01"}]}',
        ),
        *(b"\xff\xfe\xfa", b"[" * 100_000, b'{"posts": ' + b"9" * 5000 + b"}", b"\x00\x00\x00"),
        b'{"posts": [], "x": "' + b"y" * 200 + b'"}' + b" " * 2**24,
    ]
    data = b"\n".join([*bad, json.dumps({"posts": posts}).encode(), b'{"posts": []}'])
    rows, report = run(tmp_path, data, n_train=4, n_test=2, n_uniform=20)
    assert report["counts"] == {
        "lines": 16, "malformed_lines": 14, "threads": 2, "posts": len(posts), "malformed_posts": 12,
        "without_text": 3, "without_score": 4, "invalid_score": 7, "too_long": 1, "empty_after_cleaning": 2,
        "too_short": 1, "usable": 101, "duplicate_texts_among_candidates": 1,
    }  # fmt: skip
    assert [line["line"] for line in report["malformed_lines"]] == list(range(1, 11))
    assert report["malformed_lines"][8]["why"] == "not JSON: Invalid control character at (column 21)"
    everything = [row for name in rows for row in rows[name]]
    assert len({row["id"] for row in everything}) == len(everything) == 26
    printed = capsys.readouterr()
    assert "malformed lines: 14 (the first: 1, 2, 3" in printed.out
    assert "mild" not in printed.out + printed.err  # no text of a post


def test_too_few_posts_shrink_every_set_and_warn_once(tmp_path, capsys):
    rows, report = run(tmp_path, ndjson(random_threads(1000)))
    got = {name: len(r) for name, r in rows.items()}
    band = report["usable_per_bin"][9]
    assert got["train"] + got["test"] == 600 * band // 700
    assert abs(got["train"] - 2 * got["test"]) <= 2
    assert got["uniform"] == 10 * (band - got["train"] - got["test"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        f"warning: fewer posts than wanted: {got['train']} of 400 for train, {got['test']} of 200 for test, "
        f"{got['uniform']} of 1000 for uniform. A larger dump would fill them."
    ]


def test_band_across_bins_and_single_sets(tmp_path, data):
    rows, _ = run(tmp_path, data, band=(0.25, 0.65), n_bins=4, n_uniform=402, n_train=50, n_test=50)
    assert {name: len(r) for name, r in rows.items()} == {"train": 50, "test": 50, "uniform": 400}
    assert all(0.25 <= row["toxicity"] < 0.65 for row in rows["train"] + rows["test"])
    assert len({row["id"] for r in rows.values() for row in r}) == 500
    rows, _ = run(tmp_path, data, n_uniform=0, n_test=0, n_train=20)
    assert {name: len(r) for name, r in rows.items()} == {"train": 20, "test": 0, "uniform": 0}


def test_edges_of_the_scale(tmp_path):
    threads = random_threads(400)
    extra = [post(1000 + i, f"edge text of score {s}", s) for i, s in enumerate([0, 0.0, 1, 1.0, 0.9, 0.3])]
    _, report = run(tmp_path, ndjson([*threads, {"posts": extra}]), n_train=2, n_test=2, n_uniform=10)
    scores = [p["perspectives"]["TOXICITY"] for t in threads for p in t["posts"]] + [0, 0, 1, 1, 0.9, 0.3]
    assert report["usable_per_bin"] == [sum(i / 10 <= s < (i + 1) / 10 or (i == 9 and s == 1) for s in scores)
                                        for i in range(10)]  # fmt: skip


def test_max_posts_stops_after_the_thread(tmp_path, data):
    _, report = run(tmp_path, zst(data)[: -len(data) // 100], max_posts=990, n_train=5, n_test=5, n_uniform=10)
    assert report["counts"]["posts"] == 1000 and report["stopped_at_max_posts"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5))), st.integers(1, 10), st.randoms())
def test_smallest_keys_against_sorting(offers, capacity, rng):
    expected = {}
    for key, item in offers:
        expected[key] = min(expected.get(key, item), item)
    expected = {key: expected[key] for key in sorted(expected)[:capacity]}
    rng.shuffle(offers)
    sample = SmallestKeys(capacity)
    for key, item in offers:
        sample.offer(key, item)
    assert sample.kept == expected
    assert sample.copies == Counter(key for key, _ in offers if key in expected)


def test_on_the_command_line(tmp_path, data):
    missing = command(SCRIPT, "--dump", tmp_path / "none.zst", "--out", tmp_path / "out")
    assert missing.returncode == 1 and missing.stdout == ""
    assert missing.stderr.startswith("error: there is no file") and "zenodo.org" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
    (tmp_path / "dump.zst").write_bytes(zst(data))
    sizes = "--n-train", 9, "--n-uniform", 100
    done = command(SCRIPT, "--dump", tmp_path / "dump.zst", "--out", tmp_path / "out", *sizes)
    assert done.returncode == 0 and "train.jsonl" in done.stdout
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 9


def test_unreadable_and_unwritable_paths(tmp_path, data):
    with pytest.raises(UserError, match="no file"):
        script.main(Settings(dump=tmp_path))
    (tmp_path / "dump").write_bytes(data)
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write"):
        script.main(Settings(dump=tmp_path / "dump", out=tmp_path / "blocked"))


@pytest.mark.skipif(not SAMPLE.is_file(), reason="the sample of the real dump is not beside the repository")
def test_real_sample_with_default_settings(tmp_path):
    script.main(Settings(dump=SAMPLE, out=tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [line["line"] for line in report["malformed_lines"]] == [8]
    assert report["counts"]["lines"] == 200 and report["counts"]["posts"] == 4084
    assert {name: about["got"] for name, about in report["sets"].items()} == {"train": 220, "test": 110, "uniform": 550}
    ids = [json.loads(line)["id"] for name in FILES for line in (tmp_path / "out" / name).open()]
    assert len(ids) == len(set(ids)) == 880
