"""Every type of file gives the same rows; broken ones end in one line that says what is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import pytest

from stun.config import StunError
from stun.data.rows import load_rows

TEXTS = ['One, with "quotes"', "Two\twith a tab", "Three"]
ROWS = [{"text": text, "number": number} for number, text in enumerate(TEXTS)]


def table(separator: str) -> str:
    content = io.StringIO()
    writer = csv.DictWriter(content, ["text", "number"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return content.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CONTENTS = {".jsonl": LINES, ".json": json.dumps(ROWS), ".csv": table(","), ".tsv": table("\t"), ".txt": "\n".join(TEXTS)}
PACKED = {f"{kind}.gz": gzip.compress(content.encode()) for kind, content in CONTENTS.items()}


def written(file, content: str | bytes):
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("kind", [*CONTENTS, *PACKED, ".JSONL", ".Csv.GZ"])
def test_every_type_gives_the_same_texts(tmp_path, kind):
    file = written(tmp_path / f"rows{kind}", {**CONTENTS, **PACKED}[kind.lower()])
    assert load_rows(str(file), "text.path")["text"][:] == TEXTS


def test_a_folder_is_the_rows_of_its_files(tmp_path):
    """In the order of their names, with what describes them set aside; files that are named after a split are that split's."""
    for name in ("b.jsonl.gz", "a.jsonl", "README.md", "dataset_infos.json", ".hidden/c.csv"):
        written(tmp_path / "rows" / name, PACKED[".jsonl.gz"] if name.endswith("gz") else LINES if name == "a.jsonl" else "{}")
    assert load_rows(str(tmp_path / "rows"), "text.path")["text"][:] == TEXTS * 2
    for name in ("train.csv", "test.csv"):
        written(tmp_path / "splits" / name, CONTENTS[".csv"] if name == "test.csv" else "text,number\nother,1\n")
    assert load_rows(str(tmp_path / "splits"), "text.path", "test")["text"][:] == TEXTS


DEEP = LINES + '{"text": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001 + "\n"
# Files of a folder, or one file: what the error says.
BAD = {
    "nested so deep that the reader would end the process": (
        {"rows.jsonl": DEEP},
        "line 4 is nested more than 1000 deep",
    ),
    "null": ({"rows.json": "null"}, "line 1 is null, not a JSON object"),
    "a row that is null": ({"rows.jsonl": f" null\n{LINES}"}, "line 1 is null, not a JSON object"),
    "deep, packed, in a folder": (
        {"a.jsonl.gz": PACKED[".jsonl.gz"], "b.jsonl.gz": gzip.compress(DEEP.encode())},
        r"b\.jsonl\.gz: line 4 is nested more than 1000 deep",
    ),
    "a type of no data": ({"rows.xlsx": "x"}, r"unknown file type; known: \.jsonl, .*\.csv.*\.gz or \.zst, and \.parquet"),
    "packed in another way": ({"rows.jsonl.bz2": "x"}, "unknown file type"),
    "packed parquet": ({"rows.parquet.gz": "x"}, "unknown file type"),
    "not gzip": ({"rows.jsonl.gz": LINES}, "Not a gzipped file"),
    "truncated": ({"rows.jsonl.gz": PACKED[".jsonl.gz"][:-12]}, "ended before the end-of-stream marker"),
    "of nothing": ({"rows.jsonl.gz": gzip.compress(b"")}, "it has no rows"),
    "a broken line, packed": ({"rows.jsonl.gz": gzip.compress(LINES.encode() + b"{no\n")}, "JSON parse error: .* row 3"),
    "a table with ragged rows": ({"rows.csv": "text\na,b\nc,d,e,f\n"}, "Expected 2 fields in line 3, saw 4"),
    "a table in Latin-1": ({"rows.csv": "text\ncafé\n".encode("latin1")}, "can't decode byte 0xe9"),
    "an empty folder": ({}, "a folder without files that can be read; known: "),
    "a folder of other files": ({"a.py": "", "b.md": ""}, "a folder without files that can be read"),
    "a folder of two types": ({"a.jsonl": LINES, "b.csv": table(",")}, r"files of several types \(\.csv, \.jsonl\)"),
    "a folder of two spellings": ({"a.jsonl": LINES, "b.JSONL": LINES}, r"files of several types \(\.JSONL, \.jsonl\)"),
    "a folder of other fields": ({"a.jsonl": LINES, "b.jsonl": '{"body": "x"}\n'}, "column names don't match"),
    "a folder saved by datasets": ({"state.json": "{}", "b.arrow": ""}, r"was written by save_to_disk; .*\.to_parquet\("),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_says_so_in_one_line(tmp_path, name, capfd):
    files, says = BAD[name]
    (tmp_path / "rows").mkdir()
    for file, content in files.items():
        written(tmp_path / "rows" / file, content)
    path = tmp_path / "rows" / next(iter(files)) if len(files) == 1 else tmp_path / "rows"
    with pytest.raises(StunError, match=rf"task\.path={path}: .*{says}") as caught:
        load_rows(str(path), "task.path")
    assert "\n" not in str(caught.value) and "ailed" not in capfd.readouterr().err


def test_null_inside_a_row_and_many_brackets_are_read(tmp_path):
    """Also where a line of the file begins with it, and where the brackets are a text's."""
    row = {"text": "[" * 2000, "tags": [None, "a"] + [[]] * 2000}
    for name, content in {"a.json": json.dumps([row], indent=1), "b.jsonl": f"{json.dumps(row)}\n"}.items():
        assert load_rows(str(written(tmp_path / name, content)), "text.path")["text"][:] == [row["text"]]


def test_zst_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as where it is not installed
    file = written(tmp_path / "rows" / "a.jsonl.zst", b"\x28\xb5\x2f\xfd")
    for path in (file, file.parent):
        with pytest.raises(StunError, match=rf"text\.path={path}: .*pip install zstandard"):
            load_rows(str(path), "text.path")
