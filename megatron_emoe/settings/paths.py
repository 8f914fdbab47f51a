"""Files and folders that flags name, looked for before anything is imported or built. Raise ValueError, one line."""

import tempfile
from pathlib import Path


def check_folder(name: str, folder: str | Path) -> None:
    """`folder`, given with the flag `name`, is one."""
    if not Path(folder).is_dir():
        raise ValueError(f"{name} {folder}: no such folder")


def same_folder(one: str | Path | None, other: str | Path | None) -> bool:
    """Whether two flags name one folder, by whatever way, which need not exist. None: not given, no folder."""
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def check_out(path: str | Path, name: str = "--out") -> None:
    """A file can be written: its folder exists and takes one, and it is no folder itself."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"{name} {path}: the folder {Path(path).parent} does not exist")
    if Path(path).is_dir():
        raise ValueError(f"{name} {path}: is a folder; must be a file")
    if why := why_not_written(Path(path).parent):
        raise ValueError(f"{name} {path}: cannot be written ({why})")


def why_not_written(folder: str | Path) -> str | None:
    """Why a folder takes no file, None where it does. Tried, since root may write everywhere by permissions alone."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror
    return None
