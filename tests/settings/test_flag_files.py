"""@FILE stands for the words in FILE; everything wrong with a file ends with its path and the rule."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emoe.host import mode as host_mode
from megatron_emoe.settings.flag_files import expand, flag_file, flag_words, own_command
from tests import programs

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "model.args") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return f"@{path}"

    return write_file


def test_words_stand_where_the_file_was_named(write):
    word = write("--num-layers 2\n--swiglu\n")
    assert expand(["--save", "x", word, "--seed", "3"]) == "--save x --num-layers 2 --swiglu --seed 3".split()


def test_a_command_line_without_files_is_unchanged():
    argv = ["--save", "a@b", "--title=@home", "", "--seed", "1"]
    assert expand(argv) == argv


def test_comments_begin_at_the_beginning_of_a_word_only(write):
    word = write("# the model's \"shape\n--path /runs/a#1 # it's one\n--end '# not one'\n# last")
    assert expand([word]) == ["--path", "/runs/a#1", "--end", "# not one"]


def test_quotes_and_backslashes_as_in_a_shell(write):
    word = write('--moe-layer-freq "([0]+[1]*26)" --name "a \\"b\\"" \'c d\' e\\ f \\\n  --empty ""')
    expected = ["--moe-layer-freq", "([0]+[1]*26)", "--name", 'a "b"', "c d", "e f", "--empty", ""]
    assert expand([word]) == expected


def test_a_pasted_command_goes_on_over_its_line_ends(write):
    assert expand([write("--num-layers 2 \\\n  --swiglu \\\n# end\n")]) == ["--num-layers", "2", "--swiglu"]


def test_a_file_may_name_another_relative_to_itself(write):
    write("--num-experts 8", "models/base.args")
    write("@base.args --seed 1", "models/tiny.args")
    word = write("@models/tiny.args --lr 1")
    assert expand([word]) == "--num-experts 8 --seed 1 --lr 1".split()


def test_the_same_file_may_be_named_twice(write):
    word = write("--seed 1")
    assert expand([word, word]) == ["--seed", "1", "--seed", "1"]


def test_a_path_with_a_dot_is_relative_to_its_file(write, tmp_path, monkeypatch):
    text = "--tokenizer-model ./hf --data-path 0.3 ../data/a 0.7 data/b --save=./out --load /c/./d"
    write(f"{text} --title '. /x' --lr .5", "model/deep.args")
    words = "--tokenizer-model {0}/model/hf --data-path 0.3 {0}/data/a 0.7 data/b --save={0}/model/out --load /c/./d"
    expected = [*words.format(tmp_path).split(), "--title", ". /x", "--lr", ".5"]
    assert expand([write("@model/deep.args")]) == expected
    monkeypatch.chdir(tmp_path)  # absolute even so: Megatron stores it, and another run reads it from elsewhere
    assert expand(["@model/deep.args", "--save", "./out"]) == [*expected, "--save", "./out"]


def test_a_path_is_relative_to_the_working_folder(write, tmp_path, monkeypatch):
    write("--seed 1")
    monkeypatch.chdir(tmp_path)
    assert expand(["@model.args"]) == ["--seed", "1"]


def test_a_file_that_names_itself_is_refused(write, tmp_path):
    write("@one.args", "two.args")
    word = write("--seed 1 @two.args", "one.args")
    with pytest.raises(ValueError, match="@one.args: a flag file must not name itself") as caught:
        expand([word])
    assert f"{tmp_path}/one.args -> {tmp_path}/two.args -> {tmp_path}/one.args" in str(caught.value)


@pytest.mark.parametrize("text", ['--a "b', "--a b'c", '"a"b"', "--a \\", "--a b\\"])
def test_an_unbalanced_quote_is_refused_with_its_line(write, text):
    word = write(f"--seed 1 # it's fine\n\n{text}")
    with pytest.raises(ValueError, match=f"{word}: line 3 of .*model.args has a quote or a backslash without its"):
        expand([word])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"@{tmp_path}/none.args: no flag file {tmp_path}/none.args"):
        expand([f"@{tmp_path}/none.args"])


def test_a_missing_file_that_a_file_names_is_looked_for_beside_it(write, tmp_path):
    with pytest.raises(ValueError, match=f"@none.args: no flag file {tmp_path}/none.args"):
        expand([write("@none.args")])


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"@{tmp_path}: {tmp_path} is a folder, not a flag file"):
        expand([f"@{tmp_path}"])


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "weights.args").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="weights.args cannot be read as text"):
        expand([f"@{tmp_path}/weights.args"])


@pytest.mark.parametrize("name", ["x" * 300, "nul\0"])
def test_a_name_that_no_file_can_have_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="cannot be read as text|no file's name has a null character"):
        expand([f"@{tmp_path}/{name}"])


def test_only_what_separates_words_in_a_shell_does_so_here(write):
    text = "--label a\N{NO-BREAK SPACE}b c\x1fd"
    assert expand([write(text)]) == shlex.split(text)


def test_entry_points_expand_before_anything_else_sees_the_words(write, monkeypatch):
    seen = []
    monkeypatch.setattr(host_mode, "setup", lambda argv: seen.append(argv) or [*argv, "--more"])
    monkeypatch.setattr(sys, "argv", ["tool", write("--seed 1"), "--lr", "2"])
    host_mode.start()
    assert seen == [["--seed", "1", "--lr", "2"]]
    assert sys.argv[:6] == [
        "tool",
        "--seed",
        "1",
        "--lr",
        "2",
        "--more",
    ]  # behind it what a machine without an engine adds


@pytest.mark.parametrize("script", ["pretrain_emoe.py", "tools/sweep_k.py"])
def test_a_bad_file_ends_an_entry_point_with_one_message(script, tmp_path):
    done = subprocess.run([programs.python(), script, "@none.args"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"{Path(script).name}: error: @none.args: no flag file none.args\n"


def test_what_is_written_is_what_is_read(tmp_path):
    flags = {
        "num_layers": 2,
        "swiglu": True,
        "norm_epsilon": 1e-05,
        "moe_layer_freq": "([0]*1+[1]*2)",
        "a_b": "x y # z",
    }
    words = ["--num-layers", "2", "--swiglu", "--norm-epsilon", "1e-05", "--moe-layer-freq", "([0]*1+[1]*2)"]
    words += ["--a-b", "x y # z", "--load", "/a path"]
    assert flag_words(flags | {"load": "/a path"}) == words
    (tmp_path / "model.args").write_text(flag_file(flags, {"load": "/a path"}))
    assert expand([f"@{tmp_path}/model.args"]) == words


def test_the_own_command_is_what_was_typed(monkeypatch):
    typed = ["/opt/my env/bin/python", "-u", "tools/sweep_k.py", "@model.args", "--load", "my run"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert own_command() == "python -u tools/sweep_k.py @model.args --load 'my run'"
    launched = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "8"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert own_command() == "torchrun --nproc-per-node 8 tools/sweep_k.py @model.args --load 'my run'"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert own_command().startswith("torchrun --nnodes 2 --nproc-per-node 8 tools/sweep_k.py")
