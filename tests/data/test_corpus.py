"""Reading raw text: which files an input means, how they are cut, and what is said about text that cannot be read."""

import json

import pytest

from megatron_emoe.data import corpus, input_files


def pieces(path, keys=("text",)):
    return list(corpus.cut(input_files.look(str(path), keys), keys))


def documents(path, keys=("text",), errors="strict"):
    return [document for piece in pieces(path, keys) for document in corpus.read_documents(piece, keys, errors)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 10_000])
def test_jsonl_is_cut_at_line_ends_and_every_byte_is_in_one_piece(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(corpus, "MAX_LINE_SEARCH", 5)  # lines are longer than one search
    texts = ["short", "ü" * 30, "", "two\nlines", "x" * 100]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    cut = pieces(path)
    assert b"".join(piece.data for piece in cut) == path.read_bytes()
    assert all(piece.data.endswith(b"\n") for piece in cut)
    assert [piece.offset for piece in cut] == [sum(len(p.data) for p in cut[:i]) for i in range(len(cut))]
    assert sum(piece.cost for piece in cut) == path.stat().st_size
    assert [document.texts[0] for document in documents(path)] == [text for text in texts if text]


def test_text_without_line_ends_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 10)
    monkeypatch.setattr(corpus, "MAX_LINE_SEARCH", 4)
    text = "aé€😀" * 20  # characters of one, two, three and four bytes
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = documents(tmp_path / "a.txt")
    assert len(parts) > 10
    assert "".join(part.texts[0] for part in parts) == text
    assert [part.begin is None for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.end is None for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len({part.digest for part in parts}) == 1


def test_a_large_text_is_cut_after_the_line_that_reaches_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 10)
    (tmp_path / "a.txt").write_text("0123456\n89\nabcdefghijk\nthe end", encoding="utf-8")
    assert [part.texts[0] for part in documents(tmp_path / "a.txt")] == ["0123456\n89\n", "abcdefghijk\n", "the end"]
    (tmp_path / "a.txt").write_text("0123456789\nabcdefghijk\nend", encoding="utf-8")
    assert [part.texts[0] for part in documents(tmp_path / "a.txt")] == ["0123456789\n", "abcdefghijk\nend"]


def test_the_digest_is_of_the_content_wherever_it_comes_from(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n", encoding="utf-8")
    (tmp_path / "bom.txt").write_text("hello\n", encoding="utf-8-sig")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "hello\n"}, {"text": "other"}])
    same, other = documents(tmp_path / "a.jsonl")
    assert documents(tmp_path / "a.txt")[0].digest == documents(tmp_path / "bom.txt")[0].digest == same.digest
    assert other.digest != same.digest


def test_folders_are_read_in_order_by_suffix_without_hidden_files(tmp_path):
    for name in ("b/2.py", "b/1.py", "a.py", "b/3.txt", ".git/x.py", "b/.hidden.py", "z.jsonl"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found, skipped = input_files.find_files([str(tmp_path / "in")], [".py", ".jsonl"])
    names = [file.removeprefix(f"{tmp_path}/in/") for file in found]
    assert names == ["a.py", "z.jsonl", "b/1.py", "b/2.py"]
    assert skipped == [f"{tmp_path}/in/b/3.txt"]


def test_patterns_and_files_named_twice(tmp_path):
    for name in ("p2.txt", "p1.txt", "q.txt"):
        (tmp_path / name).write_text("x")
    found, _ = input_files.find_files([f"{tmp_path}/p*.txt", f"{tmp_path}/p1.txt"], [])
    assert found == [f"{tmp_path}/p1.txt", f"{tmp_path}/p2.txt"]


def test_several_keys(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "1+1", "a": "2"}, {"q": "", "a": ""}, {"a": "4", "q": ""}])
    assert [document.texts for document in documents(path, ("q", "a"))] == [("1+1", "2"), ("", "4")]
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--json-keys q a: .*a\.txt is a text file, it has one text"):
        documents(tmp_path / "a.txt", ("q", "a"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"line 4: not valid JSON: Expecting ',' delimiter"),
        (b'["text"]', r"line 4: a list, must be an object \(JSONL has one object per line\)"),
        (b'{"body": "a", "id": 1}', r"line 4: no key 'text', there are 'body', 'id' \(--json-keys\)"),
        (b'{"text": 5}', r"line 4: the value of 'text' is a int, must be a string"),
        (b'{"text": "\\ud800"}', r"line 4: 'text' has a lone surrogate '\\ud800': --errors replace"),
        (b'{"text": "\xff"}', r"line 4: .*byte 0xff at offset 46 is not UTF-8: convert the file, or give --errors"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [10, 10_000])
def test_a_bad_line_is_named_by_its_number(tmp_path, monkeypatch, line, message, piece_bytes):
    monkeypatch.setattr(corpus, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one line"}\n\n{"text": "x"}\n' + line + b'\n{"text": "z"}\n')
    with pytest.raises(ValueError, match=message):
        documents(path)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt: byte 0xe9 at offset 3 is not UTF-8: .*--errors replace"):
        documents(path)
    assert documents(path, errors="replace")[0].texts == ("caf\ufffd au lait",)
    assert documents(path, errors="ignore")[0].texts == ("caf au lait",)


def test_inputs_that_mean_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"--input .*/none\.txt: no such file or folder"):
        input_files.find_files([f"{tmp_path}/none.txt"], [".txt"])
    with pytest.raises(ValueError, match=r"--input .*: no file in it ends in \.md, \.py \(--suffix\)"):
        input_files.find_files([str(tmp_path)], [".md", ".py"])


def test_small_pieces_are_grouped_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 10)
    some = [corpus.Piece("f", "text", bytes(size), size, 1, 0) for size in (4, 4, 4, 25, 3, 3)]
    groups = list(corpus.group(some))
    assert [[piece.cost for piece in task] for task in groups] == [[4, 4, 4], [25], [3, 3]]
