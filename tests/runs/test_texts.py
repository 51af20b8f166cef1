"""Texts of people's own files: where a line ends, encodings, and the column of a table or data set."""

import json
import sys
from types import SimpleNamespace

import pytest

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import read_csv, read_json, read_jsonl, read_lines
from circuit_breaking.runs.texts import read_texts
from circuit_breaking.tasks.owt import load_texts

TEXTS = ["one\u2028and more", "two\u0085too", "three\x0c3", "four\x0b\x1c\u2029", "five é \U0001f600"]
READ = [text.strip() for text in TEXTS]
BOM = b"\xef\xbb\xbf"


def refused(path, message, *args):
    with pytest.raises(UserError, match=message) as error:
        load_texts(path, 10, *args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_ends_at_a_line_feed_or_a_carriage_return_only(tmp_path, end):
    path = tmp_path / "x.txt"
    for start in (b"", BOM):
        path.write_bytes(start + end.join(TEXTS).encode() + end.encode() * 2)
        assert read_lines(path) == read_texts(path) == READ
    train, held_out = load_texts(path, 10)
    assert held_out == READ[:1] and train == READ[1:]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x").write_bytes(BOM)
    with pytest.raises(UserError, match="holds no text"):
        read_lines(tmp_path / "x")
    (tmp_path / "x").write_bytes(BOM + b"a\n" + BOM + b"b\n")  # two files, joined
    assert read_lines(tmp_path / "x") == ["a", "b"]
    (tmp_path / "x").write_bytes(BOM + b'{"text": "a"}\n')
    assert read_json(tmp_path / "x") == {"text": "a"} and read_jsonl(tmp_path / "x") == [{"text": "a"}]
    (tmp_path / "x").write_bytes(BOM + b"text,n\na,1\n")
    assert read_csv(tmp_path / "x") == [{"text": "a", "n": "1"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["x.txt", "x.csv"])
def test_utf16_is_refused(tmp_path, encoding, name):
    (tmp_path / name).write_bytes("text\r\nA plain sentence.\r\n".encode(encoding))
    refused(tmp_path / name, "is not UTF-8 text but UTF-16 or UTF-32 text. Save it as UTF-8")


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"PAR1\x00\x15\x04\x15")
    refused(tmp_path / "x.txt", "not UTF-8 text but a binary file")


ROWS = [{"id": i, "content": f"Sentence {i}, with a comma\nand a second line."} for i in range(6)]
QUOTED = "\n".join(f'{row["id"]},"{row["content"]}"' for row in ROWS)
TABLES = {
    "x.jsonl": "\n".join(map(json.dumps, ROWS)),
    "x.txt": "\n".join(map(json.dumps, ROWS)),  # JSON, whatever its name
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "x.json": json.dumps(ROWS, indent=1),
    "list.text": json.dumps(ROWS),
    "x.csv": "id,content\n" + QUOTED,
    "x.TSV": ("id,content\n" + QUOTED).replace(',"', '\t"').replace("id,", "id\t"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_by_their_column(tmp_path, name):
    path = tmp_path / name
    path.write_text(TABLES[name])
    train, held_out = load_texts(path, 10, "content")
    assert sorted(train + held_out) == [row["content"] for row in ROWS]
    refused(path, r"there is no column 'text'; its columns are 'id', 'content'. Give .* text_column")
    if "sv" not in name.lower():  # where all cells are text
        refused(path, "row 1: column 'id' holds int, not text", "id")


def test_rows_that_hold_no_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": " "}\n{"text": "b"}\n')
    assert load_texts(path, 10) == (["b"], ["a"])
    path.write_text('{"text": "a"}\n"b"\n')
    refused(path, "row 2: str, not an object")
    path.write_text('{"text": "a \\ud800"}\n')
    refused(path, "row 1: .* UTF-8 cannot encode")
    path.write_text('{"text": " "}\n')
    refused(path, "holds no text in column 'text'")
    refused(tmp_path / "none.csv", "there is no file")
    (tmp_path / "x.txt").write_text("{a brace} opens this line\nand no JSON follows\n[1] a reference\n")
    assert len(read_texts(tmp_path / "x.txt")) == 3
    refused(tmp_path / "x.txt", "plain text and has no column 'content'", "content")
    refused("tiny", "plain text and has no column 'content'", "content")


@pytest.mark.parametrize(
    "text",
    [
        'id,text\n1,"A line, with a comma"\n2,"Another\nof two lines"\n',
        "id\ttext\ttoxicity\n1\tA line, with a comma\t0.5\n",
        ",comment_text,toxic\n0,A line,1\n",
        "text;label\r\nA line, with a comma;1\r\n\r\nAnother;0\r\n",
    ],
)
def test_a_table_under_the_name_of_plain_text_is_refused(tmp_path, text):
    (tmp_path / "x.txt").write_text(text, newline="")
    refused(tmp_path / "x.txt", "looks like a table: its first line names the columns .*Save it as .csv")


@pytest.mark.parametrize(
    "text",
    [
        "Yes, it is,\nor so they say, you know.\n",
        "Hello, world\nGood morning, world\n",  # a line of prose has white space behind a comma
        "red,green\nA sentence without a comma.\n",
        "One sentence.\nAnother.\n",
        "text\nA sentence.\n",
        "red,green,red\nblue,red,blue\n",
        "a,b\n",
    ],
)
def test_plain_text_is_not_taken_for_a_table(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    assert read_texts(tmp_path / "x.txt") == text.splitlines()


def test_a_long_cell_is_read(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text\n" + "\n".join(f'"{i} {"a" * 200_000}"' for i in range(2)))
    assert [len(text) for text in read_texts(path)] == [200_002] * 2


def test_a_data_set_with_another_column(monkeypatch):
    rows = [{"document": f"text {i}", "title": "t", "n": i} for i in range(9)]
    asked = []
    hub = SimpleNamespace(load_dataset=lambda name, **options: asked.append(name) or iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    refused("someone/texts", r"'someone/texts', row 1: there is no column 'text'; .*'document', 'title', 'n'")
    train, held_out = load_texts("someone/texts", 4, "document")
    assert held_out == ["text 0", "text 5"] and train == ["text 1", "text 2", "text 3", "text 4"]
    assert asked == ["someone/texts"] * 2
