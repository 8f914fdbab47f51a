"""What goes along with a checkpoint from import to training to export."""

from megatron_emoe.hf.companions import copy_companions, keep_companions


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


def test_weights_and_code_stay_behind(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = {"config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "README.md"}
    left = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json", "modeling_x.py"}
    for name in kept | left:
        (source / name).write_text(name)
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == kept
