"""The reader of dumps under bad bytes, bad JSON, gigantic lines and limits of memory."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from helpers.dumps import Settings, lines_of, ndjson, post, random_threads, run, script, tar, zst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_breaking.errors import UserError
from circuit_breaking.toxicity import dump as dump_module
from circuit_breaking.toxicity.dump import read_lines
from circuit_breaking.toxicity.posts import COUNTS


@pytest.fixture(scope="module")
def data():
    return ndjson(random_threads(300))


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
    assert tally.counts["posts"] == sum(tally.counts[name] for name in COUNTS[4:12])
