"""What an input means: its files, what each of them is by its content, and how it is packed."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest

from megatron_emoe.data import corpus, input_files

ROWS = [{"text": f"text {number}, ü", "id": number} for number in range(700)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKED = {
    "gzip": gzip.compress(JSONL),
    "gzip in two members": gzip.compress(JSONL[:100]) + gzip.compress(JSONL[100:]),
    "bzip2": bz2.compress(JSONL),
    "xz": lzma.compress(JSONL),
    "zstd": pyarrow.Codec("zstd").compress(JSONL, asbytes=True),
    "": JSONL,
}


def texts(path, chosen="auto", keys=("text",)):
    pieces = corpus.cut(input_files.look(str(path), keys, chosen), keys)
    return [document.texts[0] for piece in pieces for document in corpus.read_documents(piece, keys)]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("piece_bytes", [300, 1 << 20])
def test_packed_jsonl_is_read_whatever_its_name(tmp_path, monkeypatch, packing, piece_bytes):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    for name in ("part-00000", "data.JSONL", "wrong.txt"):
        (tmp_path / name).write_bytes(PACKED[packing])
        file = input_files.look(f"{tmp_path}/{name}", ("text",))
        assert (file.kind, file.packing) == ("jsonl", packing.split(" ")[0])
        assert texts(tmp_path / name) == [row["text"] for row in ROWS]
        assert sum(piece.cost for piece in corpus.cut(file, ("text",))) == len(PACKED[packing])


def test_rows_of_parquet_are_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 500)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows")
    assert texts(tmp_path / "rows") == texts(tmp_path / "rows", "parquet") == [row["text"] for row in ROWS]
    file = input_files.look(f"{tmp_path}/rows", ("text",))
    assert sum(piece.cost for piece in corpus.cut(file, ("text",))) == os.path.getsize(tmp_path / "rows")
    repeated = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "repeated.parquet")
    assert texts(tmp_path / "repeated.parquet") == ["a", "b", "a"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null")
    with pytest.raises(ValueError, match=r"null row 2: the value of 'text' is a NoneType, must be a string"):
        texts(tmp_path / "null")


TEXT = {
    "RTF": b"{\\rtf1 words}",
    "a template": b"{{ name }}\n",
    "TeX": b"{\\bf x}",
    "a link": b"[![Build](a.svg)](b)\n",
    "a footnote": b"[1] words",
    "a magic word": b"PAR1 is how Parquet begins",
    "words": b"some words\n",
}


@pytest.mark.parametrize("name", TEXT)
def test_what_cannot_be_json_is_text(tmp_path, name):
    (tmp_path / "file").write_bytes(TEXT[name])
    assert texts(tmp_path / "file") == [TEXT[name].decode()]


def test_a_first_line_longer_than_the_head_is_read_to_its_end(tmp_path):
    long = {"text": "x" * 2 * input_files.HEAD_BYTES}
    (tmp_path / "file").write_text(json.dumps(long) + "\n" + json.dumps({"text": "short"}))
    assert texts(tmp_path / "file") == [long["text"], "short"]


def test_what_a_file_is_can_be_said(tmp_path):
    pretty = json.dumps(ROWS[0], indent=1)
    (tmp_path / "pretty.json").write_text(pretty)
    assert texts(tmp_path / "pretty.json", "text") == [pretty]
    (tmp_path / "rows.txt").write_bytes(JSONL)
    assert texts(tmp_path / "rows.txt", "text") == [JSONL.decode()]


def cut_parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()[:-5]


REFUSED = {
    "pretty": (
        json.dumps(ROWS[0], indent=1).encode(),
        "begins as JSON does, but has no object on its first line: --inp",
    ),
    "list": (
        json.dumps(ROWS, indent=1).encode(),
        "begins as JSON does, but has no object on its first line: --input-fo",
    ),
    "broken": (
        b'{"text": fine}\n',
        "begins as JSON does, but has no object on its first line: --input-format jsonl or te",
    ),
    "deep": (b'{"a":' * 200_000, "begins as JSON does"),
    "named.json": (
        b"words",
        "named.json line 1: not valid JSON: Expecting value: .*; --input-format text takes the file",
    ),
    "named.JSONL.gz": (gzip.compress(b"words"), "line 1: not valid JSON"),
    "deep.jsonl": (b"[" * 200_000, "line 1: not valid JSON: too many brackets in each other"),
    "noise": (bytes(range(256)) * 8, "--input .*noise: is binary .byte 0 is 0.: convert it to text in UTF-8 or JSONL"),
    "wide.txt": ("words".encode("utf-16"), "is binary"),
    "noise.jsonl": (bytes(range(256)) * 8, "is binary"),
    "noise.gz": (gzip.compress(bytes(range(256))), "is binary"),
    "cut.gz": (PACKED["gzip"][:-9], "cut.gz: cannot be read as gzip .Compressed file ended before"),
    "bad.gz": (PACKED["gzip"][:40] + b"\xff" * 40, "cannot be read as gzip"),
    "cut.xz": (PACKED["xz"][:-9], "cannot be read as xz"),
    "cut.bz2": (PACKED["bzip2"][:-9], "cannot be read as bzip2"),
    "cut.zst": (PACKED["zstd"][:-9], "cannot be read as zstd .Truncated"),
    "more.zst": (PACKED["zstd"] + b"noise", "cannot be read as zstd"),
    "cut.parquet": (cut_parquet(), "is Parquet that was cut off or packed once more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_or_read_is_one_line(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        texts(tmp_path / name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("table", "keys", "message"),
    [
        ({"body": ["a"]}, ("text",), r"no column 'text', there are 'body' \(--json-keys\)"),
        ({"text": [1]}, ("text",), "the column 'text' is of int64, must be of strings"),
        ({"text": [["a"]]}, ("text",), r"the column 'text' is of list<.*: string>, must be of strings"),
    ],
)
def test_columns_are_checked_before_work_starts(tmp_path, table, keys, message):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        input_files.look(f"{tmp_path}/rows.parquet", keys)


def test_what_needs_pyarrow_says_so(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(input_files.importlib, "import_module", missing)
    (tmp_path / "a.zst").write_bytes(PACKED["zstd"])
    with pytest.raises(
        ValueError, match=r"a\.zst: Parquet and zstd need the Python package pyarrow: pip install pyarrow"
    ):
        input_files.look(f"{tmp_path}/a.zst", ("text",))


def test_what_is_no_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"--input .*pipe: is no file that can be read from its beginning to its end"):
        input_files.look(f"{tmp_path}/pipe", ("text",))
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"--input .*dangling: no such file or folder"):
        input_files.find_files([f"{tmp_path}/dangling"], [])


def test_a_folder_says_what_it_does_not_read(tmp_path):
    for name in ("a.json", "B.JSONL.GZ", "c.txt.zst", "d.rst", ".hidden.json", "part-00000"):
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    found, skipped = input_files.find_files([str(tmp_path)], [".json", ".jsonl", ".txt"])
    assert list(map(os.path.basename, found)) == ["B.JSONL.GZ", "a.json", "c.txt.zst"]
    assert list(map(os.path.basename, skipped)) == ["elsewhere", "d.rst", "part-00000"]
    assert input_files.not_read(skipped[1:2]) == f"1 file is not read, by --suffix: {tmp_path}/d.rst"
    assert input_files.not_read(["a"] * 7) == "7 files are not read, by --suffix: a, a, a, a, a, ..."
    assert input_files.find_files([str(tmp_path)], [""])[1] == [f"{tmp_path}/elsewhere"]
    with pytest.raises(
        ValueError, match=r"no file in it ends in \.csv \(--suffix\); it holds elsewhere, B\.JSONL\.GZ, a"
    ):
        input_files.find_files([str(tmp_path)], [".csv"])
