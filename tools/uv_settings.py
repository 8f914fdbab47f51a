"""What pip is configured to do, as settings of uv, which reads none of pip's: for tools/setup_env.sh.

    python -m pip config list | python tools/uv_settings.py

Prints a line NAME=VALUE for each environment variable that uv needs and does not have yet. Ends with status 3 and one
line on stderr where pip is told something that uv cannot be: then pip has to do the work.
"""

import ast
import os
import sys

VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
OF_PIP_ALONE = {
    *("cache-dir", "no-cache-dir", "disable-pip-version-check", "no-python-version-warning", "root-user-action"),
    *("progress-bar", "quiet", "verbose", "no-color", "no-input", "log", "retries", "exists-action"),
    *("require-virtualenv", "break-system-packages", "no-warn-script-location", "no-compile"),
}
"""How pip works and looks, not what it installs."""
SECTIONS = ("global", "install", ":env:")
"""Those that `pip install` reads, the later ones win."""


def settings(listing: str) -> dict[str, str]:
    """Settings of `pip install` by name, from the lines of `pip config list`: section.name='value'."""
    read: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listing.splitlines():
        where, _, value = line.partition("=")
        section, _, name = where.rpartition(".")
        if section in read:
            read[section][name] = ast.literal_eval(value)
    return {name: value for section in SECTIONS for name, value in read[section].items()}


def translated(found: dict[str, str]) -> dict[str, str]:
    """uv's environment variables. ValueError for a setting that has none."""
    variables = {}
    for name, value in found.items():
        if name in VARIABLES:
            # pip's lists have white space between their parts, as uv's have but for the one of find-links.
            variables[VARIABLES[name]] = ("," if name == "find-links" else " ").join(value.split())
        elif name not in OF_PIP_ALONE:
            raise ValueError(f"pip's setting {name} has no counterpart in uv")
    return variables


def main() -> None:
    try:
        variables = translated(settings(sys.stdin.read()))
    except (ValueError, SyntaxError) as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    for name, value in variables.items():
        if name not in os.environ:
            print(f"{name}={value}")


if __name__ == "__main__":
    main()
