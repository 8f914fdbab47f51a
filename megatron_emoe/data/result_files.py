"""Where results go: what may be written, a folder for what is not finished, and the move to its place."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator

DATA_SUFFIXES = (".bin", ".idx", ".json")
CACHE = "cache"  # the folder below a prefix where Megatron keeps which samples it cut from the data


def check_prefix(prefix: str) -> None:
    """ValueError where no result can have that prefix."""
    named = f"--output-prefix {prefix}"
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ValueError(f"{named}: is a folder, give a name in it")
    if os.path.isdir(prefix) and os.listdir(prefix) != [CACHE]:
        raise ValueError(f"{named}: is a folder, give a name in it")
    folder = os.path.dirname(os.path.abspath(prefix))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise ValueError(f"{named}: {folder} is no folder")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{named}: {folder} cannot be written to ({error.strerror})") from error


def check_results(prefix: str, names: Iterable[str], model: bool, inputs: Iterable[str], overwrite: bool) -> None:
    """No result takes the place of an input or a folder, nor of an earlier result unless `overwrite`.

    Args:
        prefix: what --output-prefix says.
        names: what comes behind it for each data set.
        model: whether there will be a tokenizer, <prefix>.model.
        inputs: files that are read.
        overwrite: what --overwrite says.

    Raises:
        ValueError: a result does.
    """
    named, sources = f"--output-prefix {prefix}", {os.path.realpath(file) for file in inputs}
    names = list(names)
    paths = [prefix + name + end for name in names for end in DATA_SUFFIXES] + [f"{prefix}.model"] * model
    for path in filter(os.path.exists, paths):
        if os.path.realpath(path) in sources:
            raise ValueError(f"{named}: {path} is one of the inputs")
        if os.path.isdir(path):
            raise ValueError(f"{named}: {path} is a folder")
        if not overwrite:
            raise ValueError(f"{named}: {path} exists (--overwrite replaces it)")
    for cache in filter(os.path.lexists, (os.path.join(prefix + name, CACHE) for name in names)):
        if not overwrite:
            raise ValueError(f"{named}: {cache} is of earlier data (--overwrite removes it)")


@contextlib.contextmanager
def staging(directory: str) -> Iterator[str]:
    """A folder in `directory` for what is not finished; gone afterwards, as is `directory` if made here and empty."""
    existed = os.path.isdir(directory)
    os.makedirs(directory, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".preprocess-", dir=directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed and not os.listdir(directory):
            os.rmdir(directory)


def publish(folder: str, directory: str) -> list[str]:
    """Move every staged file to its place, sidecars last: a data set with a sidecar is complete.

    Returns:
        The caches that were removed. Megatron knows one by its data's path, not by what is in them.
    """
    names = sorted(os.listdir(folder), key=lambda name: (name.endswith(".json"), name))
    stale = [os.path.join(directory, name[:-4], CACHE) for name in names if name.endswith(".idx")]
    stale = [cache for cache in stale if os.path.isdir(cache)]
    for cache in stale:
        shutil.rmtree(cache)
    for name in names:
        if name.endswith(".json"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(directory, name))
    for name in names:
        os.replace(os.path.join(folder, name), os.path.join(directory, name))
    return stale
