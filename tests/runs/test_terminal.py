"""Tables and progress as a terminal and a log file show them: nothing is cut, and there are no control codes."""

import io
import sys

import pytest

from circuit_breaking.runs import progress
from circuit_breaking.runs.plain_table import plain_table, print_table
from circuit_breaking.runs.progress import progress_bar

HEADER = ["", "edges cut", "logit difference, IO - S", "ordinary loss, nats"]
ROWS = [["original", "0", "6.390", "0.915"], ["sufficient", "139", "5.881", "1.097"]]


def cells_of(text):
    return text.replace("-", " ").split()


def test_a_table_that_fits():
    assert plain_table(HEADER, ROWS, "indirect objects", 80).splitlines() == [
        "indirect objects",
        "            edges cut  logit difference, IO - S  ordinary loss, nats",
        "----------  ---------  ------------------------  -------------------",
        "original            0                     6.390                0.915",
        "sufficient        139                     5.881                1.097",
    ]


def test_headers_are_broken_between_words():
    lines = plain_table(HEADER, ROWS, None, 46).splitlines()
    assert lines == [
        "                         logit  ordinary",
        "            edges  difference,     loss,",
        "              cut       IO - S      nats",
        "----------  -----  -----------  --------",
        "original        0        6.390     0.915",
        "sufficient    139        5.881     1.097",
    ]


@pytest.mark.parametrize("width", [24, 30, 36])
def test_a_wide_table_is_turned(width):
    rows = [[*row, "1.000 (0.500–1.500)"] for row in ROWS[:1]]
    header = [*HEADER, "perplexity"]
    lines = plain_table(header, rows, None, 48).splitlines()
    assert lines[0].split() == ["original"] and lines[-1].split(maxsplit=1) == ["perplexity", rows[0][-1]]
    narrow = plain_table(HEADER, ROWS, None, width)
    assert max(map(len, narrow.splitlines())) <= width or width < 26
    for cell in [cell for row in ROWS for cell in row]:
        assert cell in narrow


def test_a_table_that_is_too_wide_both_ways_is_split():
    names = [f"mask_{number}_seed{number}" for number in range(9)]
    header = ["", *(f"measure {number}" for number in range(9))]
    rows = [[name, *("1.000 (0.500–1.500)" for _ in range(9))] for name in names]
    text = plain_table(header, rows, None, 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.count("1.000 (0.500–1.500)") == 81 and all(text.count(name) == 3 for name in names)
    assert cells_of(text).count("measure") == 9


def test_cells_of_several_lines_and_wide_characters():
    lines = plain_table(["name", "x"], [["日本", "1\n2"], ["ab", "10"]], None, 80).splitlines()
    assert lines == ["name   x", "----  --", "日本   1", "       2", "ab    10"]
    assert plain_table(["a", "b"], [], "empty", 80).splitlines() == ["empty", "a  b", "-  -"]


def test_a_file_gets_80_columns(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(["", *HEADER[1:] * 3], [row + row[1:] * 2 for row in ROWS])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(file, monkeypatch, steps=600, seconds=0.5):
    """A bar over steps that take half a second each, by a clock that is turned by hand."""
    now = [1000.0]
    monkeypatch.setattr(sys, "stderr", file)
    with progress_bar(total=steps, desc="relax", unit="step", file=file) as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        bar.start_t = bar.last_print_t = now[0]
        for step in range(steps):
            now[0] += seconds
            bar.set_postfix_str(f"keep {step}")
            bar.update()
    return file.getvalue()


def test_a_log_file_gets_a_line_per_minute(monkeypatch):
    text = run(io.StringIO(), monkeypatch)
    assert not set("\r\x1b█") & set(text)
    lines = text.splitlines()
    assert len(lines) == 5 and lines[0].startswith("relax: 120 of 600 in 01:00, 04:00 left, keep 119")
    assert run(io.StringIO(), monkeypatch, steps=100) == ""  # less than a minute


def test_a_terminal_gets_a_bar(monkeypatch):
    assert "relax:" in (text := run(Terminal(), monkeypatch, steps=20)) and "\r" in text
    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", file)
        assert list(progress_bar([1, 2], shown=False)) == [1, 2] and file.getvalue() == ""


def test_bars_within_bars_leave_no_control_codes(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    for _ in progress_bar(range(2), desc="masks", unit="mask", file=file):
        for _ in progress_bar(range(2), desc="steps", unit="step", file=file):
            pass
    assert file.getvalue() and not set("\r\x1b") & set(file.getvalue())
