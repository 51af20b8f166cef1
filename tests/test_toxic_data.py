"""Drawing posts from a dump: what is drawn, what is counted, and every way in which a dump can be bad."""

import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_breaking import dump as dump_module
from circuit_breaking.cli import UserError
from circuit_breaking.dump import read_lines
from circuit_breaking.files import ROOT
from circuit_breaking.sampling import SmallestKeys, normalised, text_key

SCRIPT = ROOT / "toxicity" / "toxic_data_for_eval.py"
SAMPLE = ROOT.parent / "shared" / "data" / "pol_sample.ndjson"
WORDS = ("you", "silly", "old", "goose", "duck", "bother", "muddle", "grumpy", "sofa", "pancake", "rain", "again")
FILES = ("train.jsonl", "test.jsonl", "uniform.jsonl")


def load_script():
    spec = importlib.util.spec_from_file_location("toxic_data_for_eval", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
Settings = script.Settings


def post(no, com, score, **more):
    return {"no": no, "com": com, "perspectives": {"TOXICITY": score, "SPAM": 0.5}} | more


def random_threads(n_posts, seed=0, per_thread=20):
    rng = random.Random(seed)
    posts = [post(i, " ".join(rng.choices(WORDS, k=8)) + f" {i}", rng.random()) for i in range(1, n_posts + 1)]
    return [{"posts": posts[i : i + per_thread]} for i in range(0, n_posts, per_thread)]


def ndjson(threads):
    return "".join(json.dumps(thread) + "\n" for thread in threads).encode()


def tar(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zst(data):
    return zstandard.ZstdCompressor().compress(data)


def lines_of(data, **options):
    return list(read_lines(io.BytesIO(data), "dump", **options))


def run(folder, data, **options):
    """Write the dump, run the script, return its rows and its report."""
    folder.mkdir(exist_ok=True)
    (folder / "dump").write_bytes(data)
    out = folder / "out"
    script.main(Settings(dump=folder / "dump", out=out, **options))
    rows = {name[:-6]: [json.loads(line) for line in (out / name).read_text().splitlines()] for name in FILES}
    return rows, json.loads((out / "report.json").read_text())


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


def peak(threads):
    """Peak of traced memory while threads, made as they are read, are sampled."""
    compressor = zstandard.ZstdCompressor().compressobj()
    file = Pieces(piece for t in threads if (piece := compressor.compress(ndjson([t]))))
    file.pieces = iter([*file.pieces, compressor.flush()])  # compressed bytes only: a few percent of the dump
    tracemalloc.start()
    try:
        sampler, _ = script.sample(file, Settings(n_bins=2, n_uniform=100, n_train=50, n_test=50, band=(0.5, 1)))
        assert all(len(posts) for posts in sampler.draw().values())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class Pieces(io.RawIOBase):
    """A file that is made while it is read."""

    def __init__(self, pieces):
        self.pieces = iter(pieces)

    def read(self, size=-1):
        return next(self.pieces, b"")


def test_memory_does_not_grow_with_the_dump():
    small, large = peak(random_threads(3000)), peak(random_threads(15_000))
    assert large < 1.2 * small, (small, large)
    assert large < 20 * 2**20


@pytest.mark.parametrize("compress", [False, True])
def test_a_gigantic_line_is_skipped_unread(compress):
    def pieces():
        yield b'{"posts": []}\n{"posts": ['
        yield from (b" " * 2**20 for _ in range(200))
        yield b']}\n{"posts": []}\n'

    source = pieces()
    if compress:  # 200 MiB in some 20 KB
        compressor = zstandard.ZstdCompressor().compressobj()
        source = [b"".join(map(compressor.compress, source)) + compressor.flush()]
    tracemalloc.start()
    lines = read_lines(Pieces(source), "dump", max_line=2**20)
    assert [(number, line and len(line)) for number, line in lines] == [(1, 14), (2, None), (3, 14)]
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()


def test_line_limits(monkeypatch):
    assert lines_of(b"12345678\n1234\n123456789", max_line=8) == [(1, b"12345678\n"), (2, b"1234\n"), (3, None)]
    monkeypatch.setattr(dump_module, "GIVE_UP", 2**20)
    with pytest.raises(UserError, match="no newline-delimited dump"):
        lines_of(b" " * 2**21, max_line=8)


WIDE_WINDOW = b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00"  # frame header that asks for a window of 2 GiB; an empty block


def damaged_zst():
    data = zstandard.ZstdCompressor(write_checksum=True).compress(ndjson(random_threads(100)))
    return data[:300] + b"\xff" * 99 + data[399:]


def gigantic_header():
    """A tar whose first member is an extended header of 8 GiB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 8 * 2**30
    return info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096


BAD = {
    "empty": (b"", "holds no thread"),
    "blank": (b"\n\n \n", "holds no thread"),
    "another format": (b"id,text\n1,hello\n", "holds no thread"),
    "no usable post": (ndjson([{"posts": [{"no": 1}]}]), "no post with text and toxicity"),
    "no toxic post": (ndjson([{"posts": [post(i, "mild words only", 0.1) for i in range(9)]}]), "wider --band"),
    "one bin empty": (
        ndjson([{"posts": [post(i, f"mild words only {i}", 0.9 * (i % 2) + 0.05) for i in range(99)]}]),
        "too few posts of toxicity 0.1 to 0.2 for uniform",
    ),
    "truncated zst": (zst(ndjson(random_threads(100)))[:-9], "middle of its compressed data"),
    "zst cut in its header": (zst(b"x" * 100)[:6], "middle of its compressed data"),
    "damaged zst": (damaged_zst(), "is damaged"),
    "garbage after zst": (zst(ndjson(random_threads(100))) + b"garbage", "is damaged"),
    "window of 2 GiB": (WIDE_WINDOW, "zstd -d --long=31"),
    "empty tar": (tar({}), "holds no thread"),
    "tar without a dump": (tar({"README.md": b"x", "._x.ndjson": b"x"}), "holds no .ndjson"),
    "truncated tar": (tar({"x.ndjson": ndjson(random_threads(100))})[:2000], "damaged tar"),
    "gigantic header": (gigantic_header(), "damaged tar"),
    "gigantic header in zst": (zst(gigantic_header()), "damaged tar"),
}


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD.keys())
def test_bad_dumps_end_in_one_sentence_with_nothing_written(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, data)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"band": (0.9, 0.9)}, "band"),
        ({"band": (-0.1, 1.0)}, "band"),
        ({"band": (float("nan"), 1.0)}, "band"),
        ({"n_train": -1}, "n_train"),
        ({"max_posts": -1}, "max_posts"),
        ({"n_bins": 0}, "n_bins"),
        ({"n_uniform": 5}, "fewer than one post"),
        ({"n_uniform": 0, "n_train": 0, "n_test": 0}, "nothing to draw"),
    ],
)
def test_settings_that_mean_nothing(tmp_path, data, options, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, data, **options)


SEEDS = [
    ndjson(random_threads(10)),
    zst(ndjson(random_threads(10))),
    tar({"x.ndjson": ndjson(random_threads(10))}),
    tar({"d/" * 90 + "x.ndjson": ndjson(random_threads(5))}, format=tarfile.PAX_FORMAT),
    tar({"d/" * 90 + "x.ndjson": ndjson(random_threads(5))}, format=tarfile.GNU_FORMAT),
]


@st.composite
def damaged(draw):
    """A good dump with bytes replaced, cut out or put in, perhaps compressed after the damage."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        # mostly in the front, where the headers are
        start = draw(st.integers(0, min(len(data), draw(st.sampled_from([600, 2000, len(data)])))))
        data[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=12))
    return zst(bytes(data)) if draw(st.booleans()) else bytes(data)


@given(st.one_of(st.binary(max_size=2000), st.binary(max_size=2000).map(zst), damaged()))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_bytes_crash_the_reader(data):
    options = Settings(dump=Path("dump"), n_train=3, n_test=2, n_uniform=4, n_bins=2)
    try:
        sampler, tally = script.sample(io.BytesIO(data), options)
    except UserError:
        return
    sampler.draw()
    assert tally.counts["lines"] == tally.counts["malformed_lines"] + tally.counts["threads"]


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "some mild words", "<br>", "1"])
)
JSON = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.sampled_from(["no", "TOXICITY"]), SCALARS)
POST = st.fixed_dictionaries({}, optional={"no": JSON, "com": JSON, "perspectives": JSON})


@given(st.lists(JSON | st.fixed_dictionaries({"posts": JSON | st.lists(JSON | POST, max_size=4)}), max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_json_crashes_the_reader(values):
    sampler, tally = script.sample(io.BytesIO(ndjson(values)), Settings(min_characters=1))
    sampler.draw()
    assert tally.counts["posts"] == sum(tally.counts[name] for name in script.COUNTS[4:12])


def command(*words):
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, cwd="/")


def test_on_the_command_line(tmp_path, data):
    missing = command("--dump", tmp_path / "none.zst", "--out", tmp_path / "out")
    assert missing.returncode == 1 and missing.stdout == ""
    assert missing.stderr.startswith("error: there is no file") and "zenodo.org" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
    (tmp_path / "dump.zst").write_bytes(zst(data))
    done = command("--dump", tmp_path / "dump.zst", "--out", tmp_path / "out", "--n-train", 9, "--n-uniform", 100)
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
