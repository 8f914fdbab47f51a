"""What goes along with a checkpoint from import to training to export."""

import json
import re

import pytest

from megatron_emoe.hf.companions import companions, copy_companions, keep_companions


def imported(folder):
    (folder / "hf").mkdir(parents=True)
    (folder / "hf/config.json").write_text("{}")
    return folder


def test_training_takes_the_folder_along_once(tmp_path):
    load, save = imported(tmp_path / "load"), tmp_path / "runs/save"
    keep_companions(str(load), str(save))
    assert [path.name for path in save.iterdir()] == ["hf"]
    (save / "hf/config.json").write_text("mine")
    keep_companions(str(load), str(save))
    assert (save / "hf/config.json").read_text() == "mine"


def test_nothing_happens_without_a_source_or_a_target(tmp_path):
    (tmp_path / "bare").mkdir()
    keep_companions(str(tmp_path / "bare"), str(tmp_path / "save"))
    keep_companions(None, str(tmp_path / "save"))
    keep_companions(str(imported(tmp_path / "load")), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "load"]


def test_a_run_that_continues_in_its_own_folder_keeps_it(tmp_path):
    save = imported(tmp_path / "save")
    keep_companions(str(save), str(save))
    assert [path.name for path in save.iterdir()] == ["hf"]


def test_weights_stay_behind(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = {
        "config.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "modeling_x.py",
    }
    left = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"}
    for name in kept | left:
        (source / name).write_text(name)
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == kept


def test_auto_map_names_the_code_that_is_there(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    there = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "org/x--modeling_x.XModel"}
    lost = {
        "AutoModel2": "x" * 300,
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    (source / "configuration_x.py").write_text("class XConfig: ...")
    (source / "config.json").write_text(json.dumps({"k": 2, "auto_map": there | lost}))
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": lost, "vocab_size": 3}))
    (source / "words.json").write_text('["auto_map"]')
    copy_companions(source, target)
    assert json.loads((target / "config.json").read_text()) == {"k": 2, "auto_map": there}
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"vocab_size": 3}
    assert (target / "words.json").read_text() == '["auto_map"]'
    assert (target / "configuration_x.py").is_file()


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("../blobs/a1")
    message = f"{tmp_path}/tokenizer.json: is a link to ../blobs/a1, and there is no such file; fetch the model anew"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        companions(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "folder.json").mkdir()
    assert companions(tmp_path) == []
