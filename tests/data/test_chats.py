"""From chat files to ids and masks: what transformers renders, what counts by hand, and what is refused by place."""

import bz2
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_emoe.data.chat_records import messages_of, schema_of
from megatron_emoe.data.chat_template import TEMPLATES, ChatTemplate, runs, template_text
from megatron_emoe.data.files import ChatSidecar, read_sidecar, read_token_files
from megatron_emoe.data.json_list import ObjectLines
from tests.distributed import REPO

SPEC = importlib.util.spec_from_file_location("preprocess_data", REPO / "tools" / "preprocess_data.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

# Each letter is a token: A counts where it is the assistant's. Marks of turns are tokens of their own.
OWN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{{ m['content'] }}{{ '<end>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FORGETS = (  # as templates that leave out the reasoning of earlier answers
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TWO_TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


def letters(**settings: object) -> PreTrainedTokenizerFast:
    signs = [chr(code) for code in range(32, 127)] + ["\n"]
    special = ["<end>", "<pad>", "<system>", "<user>", "<assistant>", "<|im_start|>", "<|im_end|>"]
    vocab = {sign: number for number, sign in enumerate([*special, *signs])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **({"eos_token": "<end>", "pad_token": "<pad>"} | settings))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    letters(chat_template=OWN).save_pretrained(folder)
    return folder


def counted(chat, tokenizer) -> str:
    """The text of the tokens that count, a bar between stretches."""
    parts = [tokenizer.decode(chat.ids[begin:end]) for begin, end, counts in runs(chat.is_answer) if counts]
    return "|".join(part.replace(" ", "") for part in parts)


def test_two_turns_by_hand():
    words = letters()
    chat = ChatTemplate(words, OWN).encode(TWO_TURNS)
    assert words.decode(chat.ids).replace(" ", "") == (
        "<system>s<end>\n<user>hi<end>\n<assistant>yes<end>\n<user>so<end>\n<assistant>no<end>\n"
    )
    assert counted(chat, words) == "yes<end>|no<end>"  # not the break behind the end of a turn
    # <system> s <end> \n | <user> h i <end> \n | <assistant> | y e s <end> | ...
    assert np.flatnonzero(chat.is_answer).tolist() == [10, 11, 12, 13, 21, 22, 23]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ours_are_what_transformers_renders_and_counts(name):
    words = letters()
    template = ChatTemplate(words, template_text(name, words))
    assert template.marks_answers
    marked = template.encode(TWO_TURNS)
    theirs = words.apply_chat_template(
        TWO_TURNS, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    assert marked.ids.tolist() == theirs["input_ids"] and marked.is_answer.tolist() == list(
        map(bool, theirs["assistant_masks"])
    )
    ends = "<|im_end|>" if name == "chatml" else "<end>"
    assert counted(marked, words) == f"yes{ends}|no{ends}"
    # Without the marks, the same by prefixes: text, ids and what counts.
    bare = TEMPLATES[name].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    unmarked = ChatTemplate(words, bare)
    assert not unmarked.marks_answers and unmarked.render(TWO_TURNS) == template.render(TWO_TURNS)
    found = unmarked.encode(TWO_TURNS)
    assert np.array_equal(found.ids, marked.ids) and np.array_equal(found.is_answer, marked.is_answer)
    # A prompt is the beginning of what is learnt.
    whole, prompt = template.render(TWO_TURNS), template.render(TWO_TURNS[:2], prompts=True)
    assert whole.startswith(prompt) and whole[len(prompt) :].startswith("yes")


def test_templates_that_cannot_be_used():
    words = letters()
    with pytest.raises(ValueError, match="rewrites what stands before turn 3 once there is more"):
        ChatTemplate(words, FORGETS).encode(TWO_TURNS)
    with pytest.raises(ValueError, match="refuses it .*Conversation roles must alternate user/assistant"):
        ChatTemplate(words, ALTERNATES).encode(TWO_TURNS)
    ChatTemplate(words, ALTERNATES).encode(TWO_TURNS[1:])
    with pytest.raises(ValueError, match="the chat template leaves no token to the assistant"):
        ChatTemplate(
            words, "{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}"
        ).encode(TWO_TURNS)
    with pytest.raises(ValueError, match="own: the tokenizer has no template; tulu, alpaca, chatml are there"):
        template_text("own", words)
    with pytest.raises(ValueError, match="tulu: the tokenizer has no end of sequence"):
        template_text("tulu", letters(eos_token=None))


RECORDS = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "slimorca, its system message empty": {
        "conversations": [
            {"from": "system", "value": "", "weight": None},
            {"from": "human", "value": "q", "weight": 0.0},
            {"from": "gpt", "value": "a", "weight": 1.0},
        ]
    },
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "magicoder evol": {"instruction": "q", "response": "a"},
    "magicoder oss": {"lang": "python", "raw_index": 1, "index": 2, "seed": "x", "problem": "q", "solution": "a"},
    "metamath": {"type": "GSM_Rephrased", "query": "q", "original_question": "other", "response": "a"},
    "prompt": {"prompt": "q", "response": "a"},
    "openorca": {"id": "1", "system_prompt": "", "question": "q", "response": "a"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_every_kind(name):
    record = RECORDS[name]
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert messages_of(record, schema_of(record)) == expected


def test_what_stands_beside_question_and_answer():
    record = {"instruction": "add", "input": "1 2", "output": "3", "system": "short"}
    found = messages_of(record, schema_of(record))
    assert [message["content"] for message in found] == ["short", "add\n\n1 2", "3"]
    record = {"instruction": "q", "output": "a", "response": "b"}
    with pytest.raises(ValueError, match="has 'instruction' and 'output' and also 'instruction' and 'response': say"):
        schema_of(record)
    assert messages_of(record, schema_of(record, ("instruction", "response")))[1]["content"] == "b"


def test_a_list_is_read_as_lines(monkeypatch):
    import io

    from megatron_emoe.data import json_list

    values = [{"a": "x\ny", "b": [1, {"c": "]"}]}, {"d": "ü😀"}, {"e": 1}]
    for indent in (None, 2):
        for size in (1, 7, 1 << 20):
            monkeypatch.setattr(json_list, "READ_BYTES", size)
            text = "\ufeff \n" * (size > 1) + json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
            lines = io.BufferedReader(ObjectLines(io.BytesIO(text.encode()))).readlines()
            assert [json.loads(line) for line in lines] == values
    with pytest.raises(ValueError, match="record 2: not valid JSON"):
        io.BufferedReader(ObjectLines(io.BytesIO(b'[{"a": 1}, {"b"'))).read()


def call(capsys, folder: Path, tokenizer: Path, *words: object) -> tuple[int, str, str]:
    flags = ["--chat", "--output-prefix", folder / "d", "--tokenizer-type", "HuggingFaceTokenizer", "--workers", 1]
    status = tool.main([str(word) for word in (*flags, "--tokenizer-model", tokenizer, *words)])
    return status, *capsys.readouterr()


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stored(prefix: Path) -> list[list[tuple[str, int]]]:
    """Chats as they stand in the files: text of each stretch, and its mode."""
    data, words = (
        IndexedDataset(str(prefix), multimodal=True),
        AutoTokenizer.from_pretrained(str(prefix.parent / "tok")),
    )
    bounds = data.document_indices
    return [
        [(words.decode(ids).replace(" ", ""), int(mode)) for ids, mode in zip(*data[int(a) : int(b)], strict=True)]
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def test_files_of_every_kind_become_one_data_set(tmp_path, tokenizer, capsys):
    (tmp_path / "tok").symlink_to(tokenizer)
    inside = tmp_path / "in"
    inside.mkdir()
    write(inside / "a.jsonl", [{"messages": TWO_TURNS}])
    (inside / "b.json").write_text(json.dumps([RECORDS["metamath"], RECORDS["metamath"] | {"query": "r"}], indent=1))
    line = json.dumps(RECORDS["sharegpt"]) + "\n"
    (inside / "c.jsonl.bz2").write_bytes(bz2.compress(line.encode()))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([RECORDS["slimorca, its system message empty"]])
    parquet.write_table(table, inside / "d.parquet")
    status, out, err = call(capsys, tmp_path, tokenizer, "--input", inside, "--seq-length", 64)
    assert status == 0, err
    one = [("<user>q<end>\n<assistant>", 0), ("a<end>", 1), ("\n", 0)]
    other = [("<user>r<end>\n<assistant>", 0), ("a<end>", 1), ("\n", 0)]
    two = "<system>s<end>\n<user>hi<end>\n<assistant>", "yes<end>", "\n<user>so<end>\n<assistant>", "no<end>", "\n"
    assert stored(tmp_path / "d") == [[*zip(two, (0, 1, 0, 1, 0), strict=True)], one, other, one, one]
    assert "d: 5 chats, 57 tokens, 15 of them answers; the longest has 25; about 1 sequences of 64" in out
    assert (tmp_path / "d.jinja").read_text() == OWN
    sidecar, files = read_sidecar(str(tmp_path / "d")), read_token_files(str(tmp_path / "d"))
    assert isinstance(sidecar, ChatSidecar) and (sidecar.documents, sidecar.tokens) == (files.documents, files.tokens)
    assert (sidecar.answer_tokens, sidecar.longest, sidecar.chat_template, sidecar.bad) == (15, 25, "own", 0)


def test_chats_that_are_too_long_and_those_held_out(tmp_path, tokenizer, capsys):
    (tmp_path / "tok").symlink_to(tokenizer)
    turn = {"role": "user", "content": "q"}
    records = [{"messages": [turn, {"role": "assistant", "content": "y" * n}]} for n in range(1, 41)]
    path = write(tmp_path / "chats.jsonl", records)
    # <user> q <end> \n <assistant> and n letters, <end> \n: n + 7 tokens. 30 + 1 hold 24 letters.
    status, out, _ = call(capsys, tmp_path, tokenizer, "--input", path, "--seq-length", 30, "--holdout", 0.3)
    told = [read_sidecar(str(tmp_path / name)) for name in ("d", "d_heldout")]
    assert status == 0 and sum(sidecar.documents for sidecar in told) == 24 and min(s.documents for s in told) > 2
    assert "16 chats left out, longer than --seq-length + 1 tokens" in out and told[0].too_long == 16
    chats = stored(tmp_path / "d") + stored(tmp_path / "d_heldout")
    assert sorted(len(chat[1][0]) - len("<end>") for chat in chats) == list(range(1, 25))
    status, out, _ = call(
        capsys, tmp_path, tokenizer, "--input", path, "--seq-length", 30, "--long-chats", "cut", "--overwrite"
    )
    assert status == 0 and "16 chats cut off at --seq-length + 1 tokens" in out and "d: 40 chats" in out
    assert stored(tmp_path / "d")[-1] == [("<user>q<end>\n<assistant>", 0), ("y" * 26, 1)]


def test_the_number_of_workers_changes_no_byte(tmp_path, tokenizer, capsys, monkeypatch):
    from megatron_emoe.data import corpus

    monkeypatch.setattr(corpus, "PIECE_BYTES", 200)
    path = write(tmp_path / "chats.jsonl", [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(60)])
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        words = ["--input", path, "--seq-length", 30, "--holdout", 0.2, "--workers", workers]
        assert call(capsys, folder, tokenizer, *words)[0] == 0
    names = ("d.bin", "d.idx", "d.json", "d.jinja", "d_heldout.bin", "d_heldout.idx", "d_heldout.json")
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


GOOD = RECORDS["messages"]
BAD = {
    "no answer": ({"messages": [{"role": "user", "content": "q"}]}, "no turn is the assistant's: there is nothing to"),
    "unknown role": (
        {"messages": [{"role": "tool", "content": "q"}]},
        "turn 1 has the role 'tool': must be one of system, user, human, assistant, gpt",
    ),
    "empty answer": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " \n"}]},
        "turn 2 (assistant) is empty",
    ),
    "no turns": ({"messages": []}, "has no turn"),
    "turns are a text": ({"messages": "q"}, "'messages' is a str, must be a list of turns"),
    "a turn is a text": ({"messages": ["q"]}, "turn 1 is a str, must be an object"),
    "no text": ({"messages": [{"role": "user", "content": None}]}, "turn 1 (user) is a NoneType, must be a text"),
    "other keys in a turn": (
        {"messages": [{"from": "human", "value": "q"}]},
        "turn 1 has the keys 'from', 'value', must have 'role' and 'content'",
    ),
    "mixed kinds": (
        RECORDS["sharegpt"],
        "no key 'messages', there are 'conversations'; the file's first record has 'messages'",
    ),
    "a list": ([1], "a list, must be an object"),
    "half a character": (
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]},
        "turn 1 (user) has a lone surrogate '\\ud800'",
    ),
    "invalid UTF-8": (b'{"messages": "\xff"}', "byte 0xff at place 14 of it is not UTF-8"),
    "no JSON": (b"{]", "not valid JSON: Expecting property name"),
    "nested": (b"[" * 100_000, "not valid JSON: too many brackets in each other"),
    "roles do not alternate": (
        {"messages": [GOOD["messages"][0], *GOOD["messages"]]},
        "the chat template refuses it (Conversation roles must alternate user/assistant/user/assistant/...)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_chat_is_named_by_its_line(name, tmp_path, tokenizer, capsys):
    record, reason = BAD[name]
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    good = json.dumps(GOOD).encode()
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join([good, b"", line, good]) + b"\n")
    words = ["--input", path, "--seq-length", 64, "--chat-template", ALTERNATES]
    status, out, err = call(capsys, tmp_path, tokenizer, *words)
    assert status == 2 and out == ""
    (said,) = [line for line in err.splitlines() if ": error: " in line]
    assert said.startswith(f"preprocess_data.py: error: {path} line 3: {reason}")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chats.jsonl"]
    status, out, _ = call(capsys, tmp_path, tokenizer, *words, "--bad-chats", "drop")
    assert status == 0 and "d: 2 chats" in out
    assert f"1 records left out that are no chats, the first of them {path} line 3: {reason}" in out


def test_input_that_is_no_chat_file(tmp_path, tokenizer, capsys):
    def refused(name: str, content: str, *words: object) -> str:
        (tmp_path / name).write_text(content)
        status, _, err = call(capsys, tmp_path, tokenizer, "--input", tmp_path / name, "--seq-length", 64, *words)
        assert status == 2 and not (tmp_path / "d.bin").exists()
        return err

    assert "a.txt: is plain text; chats are JSONL, a JSON list or Parquet" in refused("a.txt", "words\n")
    assert "b.jsonl line 1: no chat in the keys 'text': must have messages, conv" in refused(
        "b.jsonl", '{"text": "x"}\n'
    )
    assert "c.json record 1: a int, must be an object" not in refused("c.json", "[1, 2]")
    assert "g.json: cannot be read (record 2: not valid JSON" in refused("g.json", f'[{json.dumps(GOOD)}, {{"a"')
    assert "longer than --seq-length + 1" in refused("e.jsonl", json.dumps(GOOD) + "\n", "--seq-length", 3)
    named = refused("f.jsonl", json.dumps({"x": "q", "y": "a"}) + "\n", "--json-keys", "x", "z")
    assert "f.jsonl line 1: no key 'z', there are 'x', 'y' (--json-keys)" in named


def test_flags_that_contradict_each_other(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "chats.jsonl", [GOOD])

    def refused(*words: object) -> str:
        status, _, err = call(capsys, tmp_path, tokenizer, "--input", path, *words)
        assert status == 2
        return err

    assert "--chat: needs --seq-length, that of the training" in refused()
    length = ["--seq-length", 64]
    assert "--chat excludes --append-eod" in refused(*length, "--append-eod")
    assert "--chat excludes --errors replace" in refused(*length, "--errors", "replace")
    assert "needs --tokenizer-type HuggingFaceTokenizer, not" in refused(
        *length, "--tokenizer-type", "GPT2BPETokenizer"
    )
    assert "--json-keys a b c: with --chat one column of turns" in refused(*length, "--json-keys", "a", "b", "c")
    assert "--chat-template none: no such file; must be own, tulu" in refused(*length, "--chat-template", "none")
    (tmp_path / "d.jinja").touch()
    assert "d.jinja exists (--overwrite replaces it)" in refused(*length)
    words = ["--input", str(path), "--output-prefix", str(tmp_path / "d"), "--tokenizer-type", "HuggingFaceTokenizer"]
    assert tool.main([*words, "--seq-length", "64"]) == 2
    assert "--seq-length 64: has no effect without --chat" in capsys.readouterr().err
