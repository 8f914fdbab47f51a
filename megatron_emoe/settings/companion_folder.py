"""The folder hf/ beside a checkpoint: configuration and tokenizer of the Hugging Face model that it was imported from.

An import makes it, training takes it along to where it saves.
"""

from pathlib import Path

HF_FOLDER = "hf"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer that transformers can read lies in `folder`."""
    return any((folder / file).is_file() for file in _TOKENIZERS)


def tokenizer_now(stored: str | None, checkpoints: Path) -> str | None:
    """Where the tokenizer is that a checkpoint in the folder `checkpoints` was saved with. stored: --tokenizer-model.

    Checkpoints store an absolute path. They may have been moved since, and another model may stand at the old place: a
    tokenizer in hf/ is the one beside them, and so is one that is gone.
    """
    beside = checkpoints / HF_FOLDER
    if stored is None or not has_tokenizer(beside):
        return stored
    gone = Path(stored).is_absolute() and not Path(stored).exists()
    return str(beside.resolve()) if gone or Path(stored).name == HF_FOLDER else stored
