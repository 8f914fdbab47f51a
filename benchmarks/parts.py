"""Reports that are written part by part. Runs on Python 3.11 too, which the plugin's environment has."""

import textwrap


def with_part(report: str, part: str, text: str) -> str:
    """The report with this part new, or at its end where it was not there; other parts stay as they are."""
    begin, end = f"<!-- part: {part} -->\n", f"<!-- end of part: {part} -->\n"
    report = report or (
        "# Performance\n\nMeasured and written by `make bench` and `make bench-serve`. No GPU figure is stated.\n"
    )
    before, found, rest = report.partition(begin)
    after = rest.partition(end)[2] if found else ""
    if not found:
        before += "\n"
    return f"{before}{begin}{text.strip()}\n{end}{after}"


def fill(text: str) -> str:
    """A paragraph in lines of the report's width."""
    return textwrap.fill(" ".join(text.split()), 120)
