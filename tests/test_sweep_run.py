"""What a sweep refuses before anything is built."""

import re
import sys
from argparse import Namespace

import pytest
from megatron.training.arguments import parse_args, validate_args

from megatron_emoe.arguments import add_arguments
from megatron_emoe.sweep_plan import _check_ks
from tests.tiny import flags

HOST = "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion".split()
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}  # 4 groups of 2 experts, 2 are used


def asked(monkeypatch, ks: list[int], **changes) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["sweep_k.py", *flags(**changes), *HOST])
    args = parse_args(add_arguments)
    validate_args(args)
    args.k = ks
    return args


@pytest.mark.parametrize(
    ("ks", "changes", "message"),
    [
        ([2, 9], {}, "--k 9: must lie in [1, 8], the number of experts"),
        ([0], {}, "--k 0: must lie in [1, 8], the number of experts"),
        ([2, 5], GROUPS, "--k 5: 2 groups of 2 experts hold only 4"),
        ([1, 2], GROUPS, "--k 1: must be at least --moe-router-group-topk 2, or a group has no score"),
        (
            [2, 4],
            {"moe_router_load_balancing_type": "sinkhorn"},
            "--k cannot be combined with --moe-router-load-balancing-type sinkhorn: it chooses the experts itself",
        ),
    ],
)
def test_what_cannot_run_at_another_k_is_refused(monkeypatch, ks, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _check_ks(asked(monkeypatch, ks, **changes))


def test_a_k_asked_for_twice_is_fine(monkeypatch):
    args = asked(monkeypatch, [4, 2, 4])
    _check_ks(args)
    assert args.emoe_eval_k == [4, 2]
