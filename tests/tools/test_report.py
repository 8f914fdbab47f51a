"""The command that writes the card: both files, its charts, and that an error leaves nothing."""

import dataclasses
import json
import os
import re
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep import served
from tests import sweep_results
from tests.sweep_results import make_cell, make_served

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tools"))
import report  # noqa: E402

PLAIN = {1: 1.830, 2: 1.756, 4: 1.780}
ELASTIC = {1: 1.820, 2: 1.762, 4: 1.741, 6: 1.737}

make_result = partial(sweep_results.make_result, k_train=2)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / "plain.json", tmp_path / "elastic.json"]
    sweep.save(make_result("plain", PLAIN), paths[0])
    sweep.save(make_result("elastic", ELASTIC, latency={2: 1.0, 4: 1.5}), paths[1])
    return paths


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.captions: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        if self.inside == "figcaption":
            self.captions.append(data)
        if self.inside in ("text", "tspan"):
            self.texts.append(data)


def written(files: list[Path], *flags: object) -> tuple[Page, str, str]:
    out = files[0].with_name("card.html")
    report.main([*map(str, files), "--out", str(out), *map(str, flags)])
    html = out.read_text()
    return Page(html), html, out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_page_and_markdown(files):
    page, _, markdown = written(files, "--baseline", files[0])
    assert ["6", "", "1.7370"] in page.rows
    assert "| 6 |  | 1.7370 |" in markdown
    # Loss of plain at k less the best of elastic: 1.756 - 1.737.
    assert ["elastic", "2", "1.7620", "6", "1.7370", "-0.0250", "3", "none", "+0.0190", "+0.0060"] in page.rows
    assert markdown.count("## plain\n") == 1


@pytest.mark.slow
def test_charts_are_in_the_page_and_need_nothing_else(files):
    page, html, _ = written(files)
    assert page.captions == [
        "Held-out loss over k'",
        "Latency over k'",
    ]
    assert len(page.ids) == len(set(page.ids)) > 0
    assert page.references and all(value.removeprefix("#") in page.ids for value in page.references)
    assert set(re.findall(r"https?://[^\"'\s)]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "held-out loss (nats per token)" in page.texts and "one token alone" in page.texts
    assert "a full micro-batch" not in page.texts  # not measured: no panel
    assert "#000000" not in html.split("<svg", 1)[1] and "currentColor" in html


def test_the_latency_panel_has_only_what_was_measured(files):
    results = [sweep.load(path) for path in files]
    assert report.points(results[0], "latency_ms_batch1") == []
    (axes,) = report.draw_latency(results).axes
    assert [(line.get_label(), line.get_xydata().tolist()) for line in axes.get_lines()] == [
        ("elastic", [[2.0, 1.0], [4.0, 1.5]])
    ]
    bare = files[0].with_name("bare.json")
    sweep.save(make_result("bare", PLAIN), bare)
    assert written([bare])[0].captions == ["Held-out loss over k'"]
    wider = make_result("wider", [make_cell(k, loss, expert_flops_per_token=3e6 * k) for k, loss in PLAIN.items()])
    on_cpu = [dataclasses.replace(cell, device="cpu", latency_ms_large=1.0) for cell in wider.cells]
    sweep.save(dataclasses.replace(wider, cells=on_cpu), bare)
    # Other FLOPs at the same k': the second chart is another picture. Latency of a CPU is left out.
    captions = ["Held-out loss over k'", "Held-out loss over the FLOPs of the routed experts"]
    assert written([files[0], bare])[0].captions == captions


def test_a_label_is_text_in_charts_too(files):
    nasty = "<script>x</script> $k$ & co"
    sweep.save(make_result(nasty, ELASTIC, latency={2: 1.0}), files[1])
    page, html, _ = written(files)
    assert "<script" not in html
    assert nasty in page.texts and any(text.startswith(f"{nasty}: R = 3") for text in page.texts)


@pytest.mark.slow
def test_a_baseline_that_is_one_more_file(files):
    page, _, markdown = written(files[1:], "--baseline", files[0])
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == ["Summary", "elastic", "plain"]
    assert any(text.startswith("plain: R = 1") for text in page.texts)


@pytest.mark.slow
def test_a_load_test_of_a_server(files):
    load = files[0].with_name("served.json")
    served.save(make_served(k_train=2), load)
    page, html, markdown = written(files, "--served", load)
    assert page.captions[-1] == "Served under load" and "time to the first token (ms)" in page.texts
    assert any(text.startswith("k′ = 2") for text in page.texts) and "the server's own" in page.texts
    assert "## Served\n" in markdown and len(page.ids) == len(set(page.ids))


def test_seeds(files):
    sweep.save(make_result("elastic", PLAIN), files[0])
    page, _, markdown = written(files, "--seeds", 7, 8, "--title", "Two runs")
    assert markdown.startswith("# Two runs\n")
    # (1.756 + 1.762) / 2 = 1.759; each 0.003 away: deviation sqrt(2 * 0.003^2) = 0.0042.
    assert ["2", "1.7590 ± 0.0042"] in page.rows
    assert any(text.startswith("elastic, seed 7") for text in page.texts)


@pytest.fixture
def fails(capsys):
    """A function that expects a call to be refused by one line that matches `message`."""

    def refused(arguments: list, message: str) -> None:
        with pytest.raises(SystemExit) as left:
            report.main(list(map(str, arguments)))
        (line,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and re.search(f": error: .*{message}", line), line

    return refused


def test_errors_name_the_rule_and_leave_nothing(files, tmp_path, fails):
    out = tmp_path / "card.html"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    other = tmp_path / "other.json"
    sweep.save(make_result("other", {4: 1.7}, k_train=4), other)
    before = sorted(os.listdir(tmp_path))
    fails([*files, "--out", tmp_path / "card.pdf"], "--out: .*card.pdf; must end in .html")
    fails([*files, "--out", tmp_path / "none" / "card.html"], "the folder .*none does not exist")
    fails([*files, files[0], "--out", out], "label: 'plain' is given 2 times; must be unique")
    fails([*files, broken, "--out", out], "broken.json: ")
    fails([*files, tmp_path / "nowhere.json", "--out", out], "nowhere.json: cannot be read")
    fails([*files, other, "--out", out], "k_train: 4 in other, 2 in plain; must be equal")
    fails([*files, "--baseline", other, "--out", out], "k_train: 4 in other")
    fails([*files, "--served", broken, "--out", out], "broken.json: ")
    fails([*files, "--seeds", 1, "--out", out], "--seeds: 1 given; must be one for each of the 2 results")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.slow
def test_a_card_that_cannot_be_written_keeps_the_old_one(files, tmp_path, monkeypatch, fails):
    written(files)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fails([files[1], "--out", tmp_path / "card.html"], "No space left on device")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


@pytest.mark.slow
def test_the_same_sweeps_give_the_same_card(files):
    _, first, _ = written(files)
    assert json.loads(files[0].read_text())["label"] == "plain"
    _, second, _ = written(files)
    assert first == second
