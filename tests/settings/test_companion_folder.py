"""The tokenizer of a checkpoint that was moved is the one beside it."""

import pytest

from megatron_emoe.settings.companion_folder import has_tokenizer, tokenizer_now


@pytest.fixture
def moved(tmp_path):
    """A folder of checkpoints with a tokenizer in hf/, where it is now."""
    (tmp_path / "new/hf").mkdir(parents=True)
    (tmp_path / "new/hf/tokenizer.json").write_text("{}")
    return tmp_path / "new"


def test_what_is_gone_and_what_was_beside_it_is_beside_it_now(moved, tmp_path):
    here = str(moved / "hf")
    assert tokenizer_now(str(tmp_path / "old/hf"), moved) == here
    (tmp_path / "old/hf").mkdir(parents=True)  # another model has the old place
    assert tokenizer_now(str(tmp_path / "old/hf"), moved) == here
    assert tokenizer_now(str(tmp_path / "gone.model"), moved) == here


def test_another_tokenizer_stays(moved, tmp_path):
    (tmp_path / "mine.model").write_text("")
    for name in (str(tmp_path / "mine.model"), "organisation/name", None):
        assert tokenizer_now(name, moved) == name


def test_without_one_beside_it_the_stored_one_stays(tmp_path):
    assert not has_tokenizer(tmp_path / "hf")
    assert tokenizer_now("/old/hf", tmp_path) == "/old/hf"
