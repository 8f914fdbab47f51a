"""The text of the regret study: three kinds of it, from this machine, so that no download is part of the study."""

import sys
import sysconfig
from pathlib import Path

SUFFIXES = (".py", ".rst", ".pod")
PACKAGES = {"linux-doc": "/usr/share/doc/linux-doc-*/Documentation", "perl-doc": "/usr/share/perl/5.*/pod"}
"""Debian packages, and where their text is: the kernel's documentation, and Perl's manuals."""
LEFT_OUT = ("translations",)
"""Folders of the kernel's documentation that are not mostly English."""


def sources() -> tuple[list[str], list[str]]:
    """What preprocess_data.py is to read, and the packages that are missing. Python's standard library is always
    there: its modules and packages, without what was installed beside them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [path for path in sorted(library.iterdir()) if path.name != "site-packages"]
    found = [path for path in parts if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))]
    missing = []
    for package, pattern in PACKAGES.items():
        # The newest version alone; they differ in little.
        folder = max(Path("/").glob(pattern.lstrip("/")), default=None)
        if folder is None:
            missing.append(package)
        else:
            found += _with_text(folder)
    return list(map(str, found)), missing


def _with_text(folder: Path) -> list[Path]:
    """Of a folder that has text itself the folder, else those parts of it that have some."""
    if any(folder.glob("*.pod")):
        return [folder]
    parts = (path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in LEFT_OUT)
    return [path for path in parts if any(path.rglob("*.rst*"))]


def note(missing: list[str]) -> None:
    """Say which packages would make the corpus what docs/study.md has."""
    if missing:
        names = " ".join(missing)
        print(f"study: {names} not installed; the corpus is smaller than that of docs/study.md", file=sys.stderr)
