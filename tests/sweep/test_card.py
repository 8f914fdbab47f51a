"""What an elasticity card says: values worked out by hand, cells empty where nothing was measured, two layouts."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from megatron_emoe.sweep.card import Card, make_card
from megatron_emoe.sweep.card_page import Figure, inline_svg, to_html, to_markdown
from megatron_emoe.sweep.card_table import Section, Table, with_unit
from megatron_emoe.sweep.curve import SweepData, SweepResult
from tests import sweep_results
from tests.sweep_results import make_cell

LOAD = {"p5": 0.5, "p50": 0.9, "p95": 1.8}
EVIDENCE = {
    "latency_ms_batch1": 1.25,
    "latency_ms_large": 0.5,
    "flops_per_token": 15e6,
    "router_entropy": {"2": 2.0, "3": 3.0},
    "load": {
        "2": {"min": 0.25, "max": 3.5, "dead": 0, **LOAD},
        "3": {"min": 0.0, "max": 2.5, "dead": 2, **LOAD},
    },
    "coverage": {"2": 1.0, "3": 0.5},
}


def make_result(label: str, losses: dict, *, evidence_at: int | None = None, **changes) -> SweepResult:
    rows = {"2": 64, "3": 64}
    measured = {k: EVIDENCE if k == evidence_at else {} for k in losses}
    cells = [make_cell(k, loss, rows_per_layer=rows, **measured[k]) for k, loss in losses.items()]
    fields = {
        "k_train": 2,
        "num_moe_layers": 2,
        "data": SweepData(path=["held-out"], tokens=80, digest="0f" * 32),
        "command": f"sweep_k.py --load runs/{label} --data-path 'a | b'",
    }
    return sweep_results.make_result(label, cells, **(fields | changes))


# Limit at k = 2: 1.756 * 1.001 = 1.757756. Plain passes it at 4; elastic (limit 1.763762) never does.
PLAIN = make_result("plain", {1: 1.830, 2: 1.756, 4: 1.780})
ELASTIC = make_result("elastic", {1: 1.820, 2: 1.762, 4: 1.741, 6: 1.737}, evidence_at=4)


def table(card: Card, title: str, section: int = 0) -> Table:
    (found,) = (table for table in card.sections[section].tables if table.title == title)
    return found


def column(found: Table, head: str) -> dict[str, str]:
    return {row[0]: row[found.head.index(head)] for row in found.rows}


def test_the_summary():
    found = table(make_card([PLAIN, ELASTIC], baseline=PLAIN), "Effective range, wall and gain")
    assert found.head[1:] == (
        *("k", "loss at k", "best k'", "loss there", "to k", "effective range", "wall", "peak gain", "cost at k"),
    )
    # 1.756 - 1.737 = 0.019; 1.762 - 1.756 = 0.006.
    assert found.rows == (
        ("plain", "2", "1.7560", "2", "1.7560", "+0.0000", "1", "4", "+0.0000", "+0.0000"),
        ("elastic", "2", "1.7620", "6", "1.7370", "-0.0250", "3", "none", "+0.0190", "+0.0060"),
    )


def test_without_a_baseline_there_is_no_gain():
    found = table(make_card([ELASTIC]), "Effective range, wall and gain")
    assert not {"peak gain", "cost at k"} & set(found.head) and "Peak gain" not in found.note


def test_a_baseline_beside_the_sweeps_gets_its_own_part():
    card = make_card([ELASTIC], baseline=PLAIN)
    assert [section.title for section in card.sections] == ["Summary", "elastic", "plain"]
    assert card.title == "Elasticity card: elastic"


def test_losses_side_by_side_leave_out_what_was_not_measured():
    found = table(make_card([PLAIN, ELASTIC]), "Held-out loss")
    assert found.rows[1:] == (("2", "1.7560", "1.7620"), ("4", "1.7800", "1.7410"), ("6", "", "1.7370"))


def test_the_table_of_a_sweep():
    found = table(make_card([ELASTIC]), "Quality and cost", 1)
    assert column(found, "loss") == {"1": "1.8200", "2": "1.7620", "4": "1.7410", "6": "1.7370"}
    # 1.820 / 1.762 = 1.03292; 1.737 / 1.762 = 0.98581.
    assert column(found, "to k, %") == {"1": "+3.29", "2": "+0.00", "4": "-1.19", "6": "-1.42"}
    assert column(found, "to k") == {"1": "+0.0580", "2": "+0.0000", "4": "-0.0210", "6": "-0.0250"}
    assert column(found, "ms/token, alone") == {"1": "", "2": "", "4": "1.25", "6": ""}
    assert column(found, "ms/token, full batch") == {"1": "", "2": "", "4": "0.5", "6": ""}
    assert column(found, "FLOPs/token") == {"1": "", "2": "", "4": "15 M", "6": ""}
    assert column(found, "expert FLOPs/token") == {"1": "2 M", "2": "4 M", "4": "8 M", "6": "12 M"}
    assert column(found, "active parameters")["6"] == "1.6 G"
    assert column(found, "tokens/s")["1"] == "64"


def test_routing_over_the_layers():
    found = table(make_card([ELASTIC]), "Routing", 1)
    # Entropy (2 + 3) / 2; the least load of any layer, 0, is measured and shown; coverage (1 + 0.5) / 2.
    assert found.rows[2] == ("4", "2.5", "0", "0.5", "0.9", "1.8", "3.5", "2", "0.75", "0.5")
    assert found.rows[0] == ("1", *[""] * 9)
    assert "left out" not in found.note
    assert "for 1 or more tokens" in found.note
    assert all(table.title != "Routing" for table in make_card([PLAIN]).sections[1].tables)


def measured_at_4(**changes) -> SweepResult:
    cells = [dataclasses.replace(cell, **changes) if cell.k == 4 else cell for cell in ELASTIC.cells]
    return dataclasses.replace(ELASTIC, cells=cells)


def test_columns_with_nothing_in_them_are_left_out_with_the_reason():
    routing = table(make_card([measured_at_4(coverage=None)]), "Routing", 1)
    assert "coverage, mean" not in routing.head and "Coverage is left out: the run" in routing.note
    assert routing.note.count("Coverage") == 1
    bare = table(make_card([PLAIN]), "Quality and cost", 1)
    assert not {"tail scale", "ms/token, alone", "FLOPs/token"} & set(bare.head) and "Alone" not in bare.note


def test_speed_on_a_cpu_is_left_out():
    found = table(make_card([measured_at_4(device="cpu", ranks=2)]), "Quality and cost", 1)
    assert not {"tokens/s", "ms/token, alone", "ms/token, full batch"} & set(found.head)
    assert found.note == "Forward FLOPs. Speed and latency are left out: on a CPU they say nothing of a GPU."
    on_gpu = table(make_card([measured_at_4(device="NVIDIA H100")]), "Quality and cost", 1)
    assert column(on_gpu, "ms/token, alone")["4"] == "1.25" and "CPU" not in on_gpu.note


def blocks(label: str, losses: dict[int, tuple[float, ...]], **changes) -> SweepResult:
    """Every k' with the losses of its blocks."""
    cells = [make_cell(k, sum(of) / len(of), block_losses=of) for k, of in losses.items()]
    return dataclasses.replace(make_result(label, {2: 1.7}), cells=cells, **changes)


def test_the_answer_comes_first_and_differences_have_errors():
    # To k: -0.1 and -0.3, mean -0.2, error 0.1. 6 is better than 4 by 0.0005, with an error of 0.0015: 4 is as good.
    one = blocks("one", {2: (1.8, 1.9), 4: (1.7, 1.6), 6: (1.698, 1.601)})
    base = blocks("base", {2: (1.9, 1.9), 4: (2.0, 2.0)})
    card = make_card([one], baseline=base)
    assert card.sections[0].lines == (
        "one: use k' = 4: loss -0.2000 ± 0.1000 to k = 2, at 2 times its expert FLOPs; no wall up to k' = 6",
        "base: use k' = 2: the k of training: no other measured k' is surely better; wall at k' = 4",
    )
    found = table(card, "Effective range, wall and gain")
    # Peak gain 1.9 - 1.6495 over blocks 0.202 and 0.299; cost -0.1 and 0: mean -0.05, error 0.05.
    assert column(found, "peak gain")["one"] == "+0.2505 ± 0.0485"
    assert column(found, "cost at k")["one"] == "-0.0500 ± 0.0500"
    assert column(table(card, "Quality and cost", 1), "to k")["4"] == "-0.2000 ± 0.1000"
    html, text = to_html(card), to_markdown(card)
    assert html.index("use k&#x27; = 4") < html.index("<table") and text.index("use k' = 4") < text.index("| sweep |")


def test_a_tail_scale_is_named_and_compared_with_its_like():
    scaled = dataclasses.replace(ELASTIC, tail_scale={"0": 0.5})
    card = make_card([PLAIN, scaled], baseline=PLAIN)
    assert [section.title for section in card.sections] == ["Summary", "plain", "elastic + a(k')"]
    assert card.sections[0].lines[-1] == (
        "elastic + a(k') with a tail scale, plain without: a part of the difference past k is the scale's. Fit one for "
        "runs/plain too (tools/fit_tail_scale.py) and add its sweep."
    )
    like = dataclasses.replace(PLAIN, tail_scale={"0": 0.25}, label="plain, fitted + a(k')")
    assert len(make_card([PLAIN, like, scaled], baseline=PLAIN).sections[0].lines) == 3
    ones = dataclasses.replace(ELASTIC, tail_scale={"0": 1.0})
    assert make_card([ones]).sections[1].title == "elastic"


def test_the_command_is_the_whole_line():
    command = "python tools/sweep_k.py --load runs/elastic"
    ran = dataclasses.replace(measured_at_4(ranks=2, device="cpu"), command=command)
    ran = dataclasses.replace(ran, cells=[dataclasses.replace(cell, ranks=2) for cell in ran.cells])
    assert make_card([ran]).sections[1].command == "torchrun --nproc-per-node 2 tools/sweep_k.py --load runs/elastic"
    older = dataclasses.replace(ELASTIC, command=command)
    assert make_card([older]).sections[1].command == command


def test_tail_scales_past_k():
    scaled = dataclasses.replace(ELASTIC, tail_scale={"4": 0.5, "6": 0.25})
    assert column(table(make_card([scaled]), "Quality and cost", 1), "tail scale") == {
        "1": "",
        "2": "",
        "4": "0.5",
        "6": "0.25",
    }
    origin = table(make_card([scaled]), "How it was produced", 1)
    assert column(origin, "value")["tail scale"] == "0.5 at k' = 4, 0.25 at k' = 6"
    assert column(table(make_card([ELASTIC]), "How it was produced", 1), "value")["tail scale"] == (
        "none: plain top-k'"
    )


def test_learned_scales_are_no_plain_top_k():
    trained = {"--emoe-k-schedule": "stratified", "--emoe-budget-scales": ""}
    learned = dataclasses.replace(ELASTIC, training=trained)
    fitted = dataclasses.replace(learned, tail_scale={"4": 0.5})
    said = [
        column(table(make_card([one]), "How it was produced", 1), "value")["tail scale"] for one in (learned, fitted)
    ]
    assert said == ["scales learned for each k'", "0.5 at k' = 4, on top of scales learned for each k'"]


def test_how_it_was_produced():
    card = make_card([ELASTIC])
    assert dict(table(card, "How it was produced", 1).rows) == {
        "checkpoint": "runs/elastic",
        "framework": "megatron",
        "iteration": "1",
        "k of training": "2 of 16 experts",
        "MoE layers": "2",
        "tail scale": "none: plain top-k'",
        "data": "held-out",
        "tokens": "64",
        "digest of the tokens": "0f" * 32,
        "date": "2026-01-31",
    }
    assert card.sections[1].command == ELASTIC.command


def test_how_a_newer_file_was_produced():
    newer = dataclasses.replace(
        measured_at_4(ranks=2, device="cpu"),
        training={"--emoe-selection": "prefix", "--emoe-k-schedule": "uniform"},
        trained_tokens=2_500_000,
        selection="prefix",
        versions={"torch": "2.15", "megatron-core": "0.19.2"},
        data=dataclasses.replace(ELASTIC.data, sequence_length=16),
    )
    found = dict(table(make_card([newer]), "How it was produced", 1).rows)
    assert found["training"] == "--emoe-selection prefix --emoe-k-schedule uniform"
    assert (found["tokens of training"], found["selection here"]) == ("2.5 M", "prefix")
    assert (found["ran on"], found["tokens"]) == ("2 x cpu", "64, in sequences of 16")
    assert found["versions"] == "torch 2.15, megatron-core 0.19.2"
    assert (
        dict(table(make_card([dataclasses.replace(newer, training={})]), "How it was produced", 1).rows)["training"]
        == "plain top-k"
    )


def test_a_file_of_the_first_schema_has_a_card():
    old = make_result("old", {2: 1.7, 4: 1.8}, schema=1, num_moe_layers=None, data=SweepData(path=[], tokens=80))
    card = make_card([old])
    origin = column(table(card, "How it was produced", 1), "value")
    assert "digest of the tokens" not in origin and (origin["MoE layers"], origin["data"]) == ("2", "mock data")
    assert "older than errors" in table(card, "Effective range, wall and gain").note


def test_layers_alone_and_several_at_once():
    losses = {1: 1.9, 2: 1.8, 3: 1.7, (1, 2): 1.81, (2, 1): 1.87, (2, 3): 1.75, (1, 3): 1.785, (1, 1): 1.9}
    card = make_card([make_result("layers", losses)])
    alone = table(card, "Layer sensitivity", 1)
    # The layers are numbered 2 and 3, as the counted rows are. Layer 2 was not measured at k' = 3.
    assert alone.head == ("layer", "k' = 1", "k' = 3")
    assert alone.rows == (("2", "+0.0100", ""), ("3", "+0.0700", "-0.0500"))
    several = table(card, "One k' per layer", 1)
    # (1, 3) costs what 2 everywhere costs: 1.785 - 1.8 = -0.015. (1, 1) is uniform: nothing beside it.
    assert several.rows == (
        ("1,3", "4", "1", "1.7850", "-0.0150", "2", "1.8000", "-0.0150"),
        ("1,1", "2", "0.5", "1.9000", "+0.1000", "", "", ""),
    )


def test_seeds_of_one_method():
    runs = [make_result("elastic", {2: loss, 4: loss - 0.1}) for loss in (1.70, 1.72, 1.77)]
    runs[2] = make_result("elastic", {2: 1.77})
    card = make_card([*runs, PLAIN], seeds=[1, 2, 3, 1])
    assert [section.title for section in card.sections[1:]] == [
        *("elastic, seed 1", "elastic, seed 2", "elastic, seed 3", "plain, seed 1")
    ]
    found = table(card, "Held-out loss over seeds")
    # Mean 1.73; deviations -0.03, -0.01, 0.04: squares sum to 0.0026, over 2 is 0.0013, root 0.0361. At 4 one lacks.
    assert found.head == ("k'", "elastic, 3 seeds")
    assert found.rows == (("2", "1.7300 ± 0.0361"), ("4", ""))
    assert column(table(card, "How it was produced", 2), "value")["seed of training"] == "2"
    assert card.title == "Elasticity card: elastic, plain"


@pytest.mark.parametrize(
    ("others", "options", "message"),
    [
        ([make_result("plain", {2: 1.7})], {}, "label: 'plain' is given 2 times; must be unique"),
        ([], {"seeds": [1, 2]}, "--seeds: 2 given; must be one for each of the 1 results"),
        ([make_result("plain", {2: 1.7})], {"seeds": [1, 1]}, "label: 'plain, seed 1' is given 2 times"),
        ([make_result("b", {4: 1.7}, k_train=4)], {}, "k_train: 4 in b, 2 in plain; must be equal"),
        ([make_result("b", {4: 1.7})], {}, r"b: no cell at k' = 2"),
        (
            [make_result("b", {2: 1.7}, data=SweepData(path=["held-out"], tokens=80, digest="1a" * 32))],
            {},
            r"data.digest: 0f0f0f0f0f0f\.\.\. in plain, 1a1a1a1a1a1a\.\.\. in b",
        ),
        ([make_result("b", {2: 1.7}, data=SweepData(path=["else"], tokens=80))], {}, r"data.path: \['else'\] in b"),
        ([], {"baseline": make_result("b", {2: 1.7}, k_train=2, num_experts=8)}, "num_experts: 8 in b, 16 in plain"),
    ],
)
def test_what_does_not_belong_on_one_card(others, options, message):
    with pytest.raises(ValueError, match=message):
        make_card([PLAIN, *others], **options)


def test_units():
    assert [with_unit(value) for value in (None, 12.0, 1500, 2.5e6, 3.21e9, 4e12)] == [
        *("", "12", "1.5 k", "2.5 M", "3.21 G", "4 T")
    ]


class Page(HTMLParser):
    """Tables by caption, the text of headings, and every attribute and tag seen."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag == "table":
            self.rows: list[list[str]] = []
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass
        if tag == "table":
            self.tables.setdefault(self.caption, self.rows)

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        self.text.setdefault(inside, []).append(data)
        if inside == "caption":
            self.caption = data
        if inside in ("th", "td"):
            self.rows[-1][-1] += data


def test_the_page_has_the_tables_with_empty_cells():
    page = Page(to_html(make_card([PLAIN, ELASTIC], baseline=PLAIN)))
    assert page.tables["Held-out loss"] == [
        ["k'", "plain", "elastic"],
        ["1", "1.8300", "1.8200"],
        ["2", "1.7560", "1.7620"],
        ["4", "1.7800", "1.7410"],
        ["6", "", "1.7370"],
    ]
    assert page.tables["Quality and cost"][0][:2] == ["k'", "loss"]
    assert page.text["h2"] == ["Summary", "plain", "elastic"]


def test_labels_are_text_on_the_page():
    nasty = '<script>alert("1")</script> & | $x$'
    result = dataclasses.replace(ELASTIC, label=nasty, checkpoint="<b>runs</b>", command="sweep_k.py --label '<i>'")
    html = to_html(make_card([result, PLAIN]))
    page = Page(html)
    assert "script" not in page.tags and "b" not in page.tags and "i" not in page.tags
    assert page.tables["Held-out loss"][0] == ["k'", nasty, "plain"]
    assert nasty in page.text["h2"] and page.text["title"] == [f"Elasticity card: {nasty}, plain"]
    assert page.text["code"][0] == "sweep_k.py --label '<i>'"


def test_the_page_is_for_light_dark_and_paper():
    html = to_html(make_card([PLAIN]))
    style = "".join(Page(html).text["style"])
    assert "prefers-color-scheme: dark" in style and "@media print" in style and "color-scheme: light dark" in style
    assert Page(html).links == [] and "http" not in html


def test_a_chart_takes_the_colours_of_the_page_and_its_own_ids():
    drawn = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg viewBox="0 0 1 1"><metadata>http://x</metadata><g id="b"/>'
        '<path id="a" style="stroke: #000000; fill: #ffffff"/><use xlink:href="#a"/><g clip-path="url(#a)"/></svg>\n'
    )
    assert inline_svg(drawn, "one") == (
        '<svg viewBox="0 0 1 1"><g/><path id="one-a" style="stroke: currentColor; fill: var(--page)"/>'
        '<use xlink:href="#one-a"/><g clip-path="url(#one-a)"/></svg>'
    )
    page = Page(to_html(make_card([PLAIN]), [Figure("loss <over> k'", inline_svg(drawn, "one"))]))
    assert page.ids == ["one-a"] and page.text["figcaption"] == ["loss <over> k'"]
    assert page.tags.index("svg") < page.tags.index("pre")


def test_markdown_has_the_same_tables():
    text = to_markdown(make_card([PLAIN, ELASTIC]))
    assert "| k' | plain | elastic |\n| --- | ---: | ---: |\n| 1 | 1.8300 | 1.8200 |" in text
    assert "| 6 |  | 1.7370 |" in text
    assert "\n    sweep_k.py --load runs/plain --data-path 'a | b'\n" in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Summary", "plain", "elastic"]


def test_markdown_shows_labels_as_they_are():
    odd = Section("a|b", (Table("t", ("h*", "<x>"), (("`c`", "[d](e)"),)),))
    text = to_markdown(Card("two\nlines", (odd,)))
    assert text.startswith("# two lines\n") and "## a\\|b\n" in text
    assert "| h\\* | &lt;x&gt; |" in text and "| \\`c\\` | \\[d\\](e) |" in text


def test_what_a_server_gave_under_load():
    result = make_result("a", {2: 2.0, 4: 1.9})
    section = make_card([result], served=[sweep_results.make_served(k_train=2)]).sections[-1]
    assert (section.title, section.command) == ("Served", "python tools/serve_bench.py")
    assert section.lines == ("the server's own k' of answers, mean: 7 at 2, 3.25 at 8 requests/s",)
    (table,) = section.tables
    times = ("20", "18", "40", "5", "4.5", "9")
    assert table.rows[0] == ("2", "2", "2.00", "2.00", "2.2000", "1.9", "61.5", *times)
    assert table.rows[2] == ("8", "the server's own", "3.25", "", "", "1.9", "61.5", *times)
    assert "20 requests of 64 tokens, 32 to write, seed 3" in table.note and len(table.head) == len(table.rows[0])
    with pytest.raises(ValueError, match="--served: of a model with k = 4, a has 2; must be equal"):
        make_card([result], served=[sweep_results.make_served(k_train=4)])
