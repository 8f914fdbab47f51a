"""Tables of named budgets, and what may be said of following the load: what is read, and every refusal's text."""

import json
from types import SimpleNamespace

import pytest

from emoe_vllm.budgets import Budget, Model, read_budgets
from emoe_vllm.settings import decide, decided

MODEL = Model(k_train=4, experts=24, layers=2, most=24)
ENTRIES = [
    {"name": "fast", "k": 2, "loss": 2.31, "quality": 0.97, "expert_flops": 0.5, "latency_ms_batch1": 3.0},
    {"name": "default", "k": 4, "loss": 2.23, "quality": 1.0, "expert_flops": 1.0},
    {"name": "best", "k": [8, 12], "loss": 2.2, "quality": 1.03, "expert_flops": 2.5, "latency_ms_large": 0.7},
]
TABLE = {"version": 1, "checkpoint": "runs/a", "k_train": 4, "num_experts": 24, "budgets": ENTRIES}


def test_a_table_from_a_file_and_inside_the_flag(tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(TABLE))
    expected = (Budget("fast", 2, 0.97, 0.5), Budget("default", 4, 1.0, 1.0), Budget("best", (8, 12), 1.03, 2.5))
    assert read_budgets(str(path), "flag", MODEL) == read_budgets(TABLE, "flag", MODEL) == expected


def one(**changes):
    """The table with one budget that is changed so."""
    return TABLE | {"budgets": [{"name": "a", "k": 2} | changes]}


BAD = [
    (TABLE | {"version": 2}, "version 2: input should be 1"),
    ({key: TABLE[key] for key in TABLE if key != "k_train"}, "k_train: is missing"),
    (TABLE | {"k_train": 2}, "k_train 2: is another model's; this one has 4"),
    (TABLE | {"k_train": True}, "k_train True: input should be a valid integer"),
    (TABLE | {"num_experts": 64}, "num_experts 64: is another model's; this one has 24"),
    (TABLE | {"layers": 2}, "layers: is not known"),
    (TABLE | {"budgets": []}, r"budgets \[\]: list should have at least 1 item"),
    (TABLE | {"budgets": [7]}, r"budgets\[0\] 7: input should be an object"),
    (one(qualty=1.0), r"budgets\[0\].qualty: is not known"),
    (one(k=25), r"budgets\[0\].k 25: must be a whole number in \[1, 24\], or a list with one for each of the 2 layers"),
    (one(k=0), r"budgets\[0\].k 0: must be a whole number in \[1, 24\]"),
    (one(k=True), r"budgets\[0\].k True: must be"),
    (one(k=[4]), r"budgets\[0\].k \[4\]: must be"),
    (one(k=[4, 4, 4]), r"budgets\[0\].k \[4, 4, 4\]: must be"),
    (one(k="all"), r"budgets\[0\].k 'all': must be"),
    (one(name="8"), r"budgets\[0\].name '8': must be printable text that is no number"),
    (one(name="a\nb"), r"budgets\[0\].name 'a\\nb': must be printable text"),
    (one(quality=0), r"budgets\[0\].quality 0: input should be greater than 0"),
    (one(quality=float("nan")), r"budgets\[0\].quality nan: input should be a finite number"),
    (one(expert_flops="1"), r"budgets\[0\].expert_flops '1': input should be a valid number"),
    (TABLE | {"budgets": ENTRIES[:1] * 2}, r"budgets\[1\].name 'fast': is there twice; names must be unique"),
    (TABLE | {"budgets": ENTRIES[::-1]}, r"budgets\[1\].expert_flops 1.0: must be ascending"),
]


@pytest.mark.parametrize(("table", "message"), BAD)
def test_a_bad_table_is_refused_in_both_places(table, message, tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_budgets(str(path), "flag", MODEL)
    with pytest.raises(ValueError, match=f"^flag: {message}"):
        read_budgets(table, "flag", MODEL)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON: EOF"), ("\0", "is no JSON"), ("[]", r" ?\[\]: input should")]
)
def test_a_file_that_is_no_table_is_refused(text, message, tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_budgets(str(path), "flag", MODEL)
    with pytest.raises(ValueError, match=f"^{tmp_path}: cannot be read: Is a directory"):
        read_budgets(str(tmp_path), "flag", MODEL)


OLMOE = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 24, "num_experts_per_tok": 4}
CONFIG = SimpleNamespace(**OLMOE, num_hidden_layers=2, emoe={"k_train": 4, "k_range": [3, 8]})


def settings(**asked):
    return decide(CONFIG, {"emoe": asked})


def test_named_budgets_widen_the_range_unless_it_is_set():
    assert (settings().k_min, settings().k_max) == (3, 8)
    wide = settings(budgets=TABLE, k="fast")
    assert (wide.k_min, wide.k_max, wide.k) == (2, 12, 2)
    narrow = settings(budgets=TABLE, k_max=8, k_min=3)
    assert [budget.name for budget in narrow.budgets] == ["default"] and (narrow.k_min, narrow.k_max) == (3, 8)
    assert decided({"emoe": json.loads(json.dumps(wide.as_json()))}) == wide


def test_what_is_known_of_a_k():
    found = settings(budgets=TABLE)
    assert found.budget_at((4, 4)).name == "default" and found.budget_at(6) is None
    assert (found.quality((8, 12)), found.quality(3), settings().quality(4)) == (1.03, None, 1.0)


def test_levels_below_the_floor_are_left_out():
    follow = {"0": "best", "8": "default", "32": "fast"}
    table = settings(budgets=TABLE, follow=follow).follow
    assert (table.starts, table.ks, table.hold, table.margin) == ((0, 8, 32), ((8, 12), 4, 2), 16, 2)
    table = settings(budgets=TABLE, follow=follow, min_quality=0.98, hold=3, margin=7).follow
    assert (table.starts, table.ks, table.left_out) == ((0, 8), ((8, 12), 4), ((32, 2),))
    assert settings(follow={"0": [8, 6], "5": [4, 4]}).follow.margin == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budgets": 3}, "budgets 3: must be the path of a table, the table itself, or false"),
        (
            {"budgets": TABLE, "k": "bset"},
            r"k 'bset': must be one of fast, default, best, or a whole number in \[2, 12\]",
        ),
        ({"budgets": TABLE, "k_max": 8, "k": "best"}, "k 'best': must be one of fast, default, or a whole"),
        ({"hold": 3}, "hold 3: only with follow"),
        ({"min_quality": 0.9}, "min_quality 0.9: only with follow"),
        ({"follow": [8, 4]}, r"follow \[8, 4\]: must be an object of requests and k', such as"),
        ({"follow": {"few": 8}}, "follow {'few': 8}: must be an object of requests and k'"),
        ({"follow": {"1": 8}}, "follow 1: must have 0 among the requests, and none twice"),
        ({"follow": {"0": 8, "4": 6, "04": 4}}, "follow 0, 4, 04: must have 0 among the requests, and none twice"),
        ({"follow": {"0": 9}}, r"follow.0 9: must be a whole number in \[3, 8\]"),
        ({"follow": {"0": "best"}}, "follow.0 'best': must be a whole number"),
        ({"follow": {"0": 4, "8": [3, 5]}}, r"follow.8 \[3, 5\]: must need fewer experts than 4 from 0 on"),
        ({"follow": {"0": 8, "8": 4}, "hold": 1.5}, "hold 1.5: must be a whole number 0 or more"),
        (
            {"follow": {"0": 8, "8": 4, "10": 3}, "margin": 2},
            r"margin 2: must be a whole number in \[0, 1\], less than",
        ),
        ({"follow": {"0": 8, "8": 4}, "min_quality": "high"}, "min_quality 'high': must be a number above 0"),
        ({"follow": {"0": 8, "8": 4}, "min_quality": 0.9}, "follow.0 8: its quality is not known; with min_quality it"),
        (
            {"budgets": TABLE, "follow": {"0": "default", "8": "fast"}, "min_quality": 1.01},
            "follow.0 4: has a quality of 1; must be at least min_quality, 1.01",
        ),
    ],
)
def test_a_flag_that_cannot_be_is_refused(asked, message):
    with pytest.raises(ValueError, match=f"^--additional-config emoe.{message}"):
        settings(**asked)
