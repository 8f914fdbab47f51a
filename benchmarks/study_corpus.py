"""The text of the studies, all of it from this machine: no download is part of them."""

import sysconfig
from pathlib import Path

SUFFIXES = (".py", ".rst", ".pod")
PACKAGES = {"linux-doc": "/usr/share/doc/linux-doc-*/Documentation", "perl-doc": "/usr/share/perl/5.*/pod"}
"""Debian packages, and where their text is: the kernel's documentation, and Perl's manuals."""
LEFT_OUT = ("translations",)
"""Folders of the kernel's documentation that are mostly not in English."""


def text() -> tuple[list[str], tuple[str, ...], list[str]]:
    """What preprocess_data.py is to read, with which suffixes, and the packages that are missing: without them there is
    Python's standard library alone."""
    found, missing = python_sources(), []
    for package, pattern in PACKAGES.items():
        folder = max(
            Path("/").glob(pattern.lstrip("/")), default=None
        )  # of several versions one: they differ in little
        if folder is None:
            missing.append(package)
        else:
            found += map(str, _with_text(folder))
    return found, SUFFIXES, missing


def python_sources() -> list[str]:
    """The Python standard library: its modules and packages, without what was installed beside them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [path for path in sorted(library.iterdir()) if path.name != "site-packages"]
    return [str(path) for path in parts if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))]


def _with_text(folder: Path) -> list[Path]:
    """The folder where it has manuals itself, else those of its folders that have documents."""
    if any(folder.glob("*.pod")):
        return [folder]
    parts = (path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in LEFT_OUT)
    return [path for path in parts if any(path.rglob("*.rst*"))]
