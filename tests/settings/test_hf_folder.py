"""A model by the name that it has on the hub: fetched by huggingface_hub where there is no such folder."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from megatron_emoe.settings.hf_folder import hf_folder, model_name


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the one model org/there; the names that it was asked for."""
    asked: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns and not any("bin" in pattern for pattern in allow_patterns)
        if name == "org/there":
            return str(tmp_path / "snapshot")
        if name == "org/offline":
            raise LocalEntryNotFoundError("Cannot find the snapshot folder.\nCheck your connection.")
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_folder_wins_and_a_name_is_fetched(hub, tmp_path):
    (tmp_path / "org/there").mkdir(parents=True)
    (tmp_path / "org/there/config.json").write_text("{}")
    assert hf_folder("--hf", "org/there") == Path("org/there") and hub == []
    (tmp_path / "org/there/config.json").unlink()
    (tmp_path / "org/there").rmdir()
    assert hf_folder("--hf", Path("org/there")) == tmp_path / "snapshot" and hub == ["org/there"]


def test_what_a_model_is_called(tmp_path):
    assert model_name(tmp_path / "models--org--there/snapshots/0a1b2c") == "there"
    assert model_name(tmp_path / "snapshots/mine") == "mine" and model_name(tmp_path / "mine/") == "mine"
    assert model_name("/") == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("org/offline", "--hf org/offline: no such folder, and not fetched from the Hugging Face hub (Cannot find the"),
        (
            "org/none",
            "--hf org/none: no such folder, and not fetched from the Hugging Face hub (RepositoryNotFoundError",
        ),
        ("alone", "alone/config.json: no such file; alone is no Hugging Face model"),
        ("a/b/c", "a/b/c/config.json: no such file; a/b/c is no Hugging Face model"),
        ("/a/b", "/a/b/config.json: no such file; /a/b is no Hugging Face model"),
        ("../b", "../b/config.json: no such file; ../b is no Hugging Face model"),
        ("snapshot/config.json", "snapshot/config.json/config.json: no such file"),
    ],
)
def test_one_line_where_it_is_not_there(hub, given, message):
    with pytest.raises(ValueError) as refused:
        hf_folder("--hf", given)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert hub == ([given] if given.startswith("org/") else [])
