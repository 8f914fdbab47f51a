"""What is decided from config.json and the flag, without an engine; and every refusal's text."""

from types import SimpleNamespace

import pytest
import torch

from emoe_vllm import refusals
from emoe_vllm.block import read_block
from emoe_vllm.layers import moe_layers, reachable_experts
from emoe_vllm.levels import Levels, Tables
from emoe_vllm.settings import asked_for, block_of, decide, decided

OLMOE = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2}


def config(**changes):
    return SimpleNamespace(**(OLMOE | {"num_hidden_layers": 2} | changes))


def test_the_block_decides_what_the_flag_leaves_open():
    found = decide(config(emoe={"k_train": 2, "k_range": [1, 6]}), {})
    assert (found.k_train, found.k_min, found.k_max, found.k, found.layers) == (2, 1, 6, 2, (0, 1))
    assert decide(config(emoe={"k_range": [1, 6], "k_per_layer": [3, 1]}), {}).k == (3, 1)
    assert decide(config(num_experts_per_tok=7, emoe={"k_train": 2, "k_range": [1, 6]}), {}).k_max == 7  # of --k
    assert decide(config(emoe={"k_train": 3}), {}).k_max == 6  # an older export


def test_the_flag_may_ask_for_more_and_for_less():
    block = {"k_train": 2, "k_range": [1, 6]}
    assert decide(config(emoe=block), {"emoe": {"k": 8}}).k_max == 8
    found = decide(config(emoe=block), {"emoe": {"k": [4, 2], "k_min": 2, "k_max": 4}})
    assert (found.k, found.k_min, found.k_max) == ((4, 2), 2, 4)


def test_a_decision_survives_its_way_through_json():
    import json

    found = decide(config(), {"emoe": {"k": [1, 4]}})
    assert decided({"emoe": json.loads(json.dumps(found.as_json()))}) == found
    assert decided({}) is None and decided({"emoe": {"k": 3}}) is None


def test_who_is_served_elastically():
    assert not asked_for(config(), {}) and asked_for(config(emoe={}), {}) and asked_for(config(), {"emoe": {}})
    assert asked_for(config(), {"emoe": True}) and not asked_for(config(emoe={}), {"emoe": False})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"k": 9}, r"--additional-config emoe.k 9: must be a whole number in \[1, 8\], the k' that are served"),
        ({"k": 0}, r"emoe.k 0: must be a whole number in \[1, 4\]"),
        ({"k": [1]}, r"emoe.k \[1\]: must have one k' for each of the 2 layers with experts"),
        ({"k": "best"}, r"emoe.k 'best': must be a whole number in \[1, 4\]"),
        ({"k_max": 9}, r"emoe.k_max 9: must be a whole number in \[1, 8\]"),
        ({"k_min": 5}, r"emoe.k_min 5: must be a whole number in \[1, 4\]"),
        ({"experts": 3}, r"emoe.experts: is not known; known: k, k_min, k_max"),
    ],
)
def test_a_flag_that_cannot_be_is_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        decide(config(), {"emoe": flag})


def test_a_flag_that_is_no_object_is_refused():
    with pytest.raises(
        ValueError, match="--additional-config emoe 3: must be an object with k, k_min, k_max, budgets,"
    ):
        asked_for(config(), {"emoe": 3})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([], r"emoe \[\]: must be an object"),
        ({"k_train": 9}, r"emoe.k_train 9: must be a whole number in \[1, 8\]"),
        ({"k_range": [3, 1]}, r"emoe.k_range \[3, 1\]: must be ascending in \[1, 8\]"),
        ({"k_range": 3}, r"emoe.k_range 3: must be \[smallest, largest\]"),
        ({"k_per_layer": [1]}, r"emoe.k_per_layer \[1\]: must have one k' for each of the 2 layers"),
        ({"tail_scale": ["4:x"]}, r"emoe.tail_scale '4:x': must be a list of words"),
        ({"tail_scale": ["4:0.1", "4:0.2"]}, r"emoe.tail_scale '4:0.2': must be"),
        ({"tail_scale": ["-1"]}, r"emoe.tail_scale '-1': must be"),
        ({"tail_scale": 0.5}, r"emoe.tail_scale 0.5: must be"),
        ({"budget_scales": {"k": [2]}}, r"emoe.budget_scales: must be an object with the keys k and log"),
        ({"budget_scales": {"k": [4, 2], "log": []}}, r"emoe.budget_scales.k \[4, 2\]: must be whole numbers"),
        ({"budget_scales": {"k": [2], "log": [[[0.0]]] * 2}}, r"emoe.budget_scales.log: must have, for every layer, 2"),
        ({"budget_scales": {"k": [1], "log": [[[99]]] * 2}}, r"emoe.budget_scales.log: 99; must be a number in"),
    ],
)
def test_a_block_that_cannot_be_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        read_block(block, 2, 8, 2)


def test_which_layers_have_experts():
    def layers(**changes):
        return moe_layers(SimpleNamespace(**({"num_hidden_layers": 6} | changes)))

    assert layers(model_type="mixtral") == (0, 1, 2, 3, 4, 5)
    assert layers(model_type="qwen2_moe", mlp_only_layers=[3], decoder_sparse_step=2) == (1, 5)
    assert layers(model_type="deepseek_v2", first_k_dense_replace=1, moe_layer_freq=1) == (1, 2, 3, 4, 5)
    ernie = {"model_type": "ernie4_5_moe", "moe_layer_interval": 1, "moe_layer_start_index": 1}
    assert layers(**ernie, moe_layer_end_index=-1) == (1, 2, 3, 4, 5) and layers(**ernie, moe_layer_end_index=2) == (
        1,
        2,
    )


def test_a_token_of_limited_groups_has_the_experts_of_its_groups():
    assert reachable_experts(SimpleNamespace(n_routed_experts=64, n_group=8, topk_group=3)) == 24
    assert reachable_experts(SimpleNamespace(n_routed_experts=64, n_group=1, topk_group=1)) == 64


def test_the_factors_are_those_of_megatron_emoes_hooks():
    from megatron_emoe.routing.budget_scales import at_budget
    from megatron_emoe.settings.budget_table import read_budget_table
    from megatron_emoe.settings.tail_scale import parse_tail_scale

    generator = torch.Generator().manual_seed(0)
    log = [[torch.randn(k, generator=generator).tolist() for k in (2, 5)] for _ in range(2)]
    raw = {"k_train": 2, "tail_scale": ["4:0.5", "8:0.1"], "budget_scales": {"k": [2, 5], "log": log}}
    block, theirs = read_block(raw, 2, 8, 2), read_budget_table(raw, 2, 8)
    for k in range(1, 9):
        tail = parse_tail_scale(raw["tail_scale"]).at(k) if k > 2 else 1.0
        for layer in range(2):
            expected = at_budget(torch.tensor(theirs.padded(layer)), theirs.ks, k).exp()
            expected[2:] *= tail
            torch.testing.assert_close(torch.tensor(block.factors(layer, k)), expected)


def test_a_level_is_a_budget_and_padding_is_none():
    settings = decide(config(), {"emoe": {"k": [1, 4]}})
    levels = Levels(settings)
    tables = Tables(levels, block_of(config()), torch.device("cpu"))
    assert levels.of(3) == 3 and levels.of((2, 2)) == 2 and levels.of((1, 4)) == 5 and levels.of((4, 1)) == 6
    assert levels.budget(6) == (4, 1) and levels.layout(3) == (3, 3)
    tables.learn(levels.layouts)
    assert [table.k_V[:7].tolist() for table in tables.layers] == [[0, 1, 2, 3, 4, 1, 4], [0, 1, 2, 3, 4, 4, 1]]
    assert tables.layers[1].factors_VK[[0, 2, 5]].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    for first in range(1, 5):
        for second in range(1, 5):
            levels.of((first, second))
    assert len(levels.layouts) == 12


def test_a_model_that_the_plugin_does_not_know_is_refused():
    from emoe_vllm.runner import _check_not_asked

    known = ", ".join(["OlmoeForCausalLM", "Qwen2MoeForCausalLM"])
    other = SimpleNamespace(hf_config=config(architectures=["OtherMoe"]))
    _check_not_asked(SimpleNamespace(model_config=other, additional_config={}))
    _check_not_asked(SimpleNamespace(model_config=None, additional_config={}))
    with pytest.raises(ValueError, match=f"architecture OtherMoe: elastic experts are supported in {known}"):
        _check_not_asked(SimpleNamespace(model_config=other, additional_config={"emoe": {"k": 2}}))


def server(**changes):
    """As much of vLLM's configuration as is looked at."""
    parts = {
        "parallel_config": {
            "data_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_sequence_parallel_moe": False,
            "enable_dbo": False,
            "ubatch_size": 0,
            "enable_eplb": False,
            "worker_cls": "auto",
        },
        "scheduler_config": {"scheduler_cls": None},
        "kernel_config": {"moe_backend": "auto"},
        "model_config": {"quantization": None, "enable_return_routed_experts": False, "runner_type": "generate"},
    }
    whole = {"lora_config": None, "speculative_config": None, "kv_transfer_config": None, "additional_config": {}}
    for part, values in parts.items():
        mine = {key: value for key, value in changes.items() if key in values}
        whole[part] = SimpleNamespace(**(values | mine))
    return SimpleNamespace(**(whole | {key: value for key, value in changes.items() if key in whole}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data_parallel_size": 2},
            "--data-parallel-size 2: not with elastic experts, the layers with experts would see",
        ),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"use_sequence_parallel_moe": True}, "sequence parallelism of experts True: not with elastic experts"),
        ({"enable_dbo": True}, "--enable-dbo True: not with elastic experts"),
        ({"ubatch_size": 2}, "--ubatch-size 2: not with elastic experts"),
        ({"enable_eplb": True}, "--enable-eplb True: not with elastic experts, experts past a token's k'"),
        ({"lora_config": object()}, "--enable-lora True: not with elastic experts, experts with adapters run at the k"),
        ({"speculative_config": object()}, "--speculative-config True: not with elastic experts, drafted tokens"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config True: not with elastic experts, another server's"),
        ({"moe_backend": "flashinfer_trtllm"}, "--moe-backend flashinfer_trtllm: not with elastic experts"),
        ({"worker_cls": "mine.Worker"}, "--worker-cls mine.Worker: not with elastic experts, the plugin has its own"),
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "--scheduler-cls vllm.v1.* must be a subclass of",
        ),
        ({"runner_type": "pooling"}, "--runner pooling True: not with elastic experts"),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts True: not with elastic experts"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, message):
    refusals.check(server())
    with pytest.raises(ValueError, match=message):
        refusals.check(server(**changes))


def test_the_second_model_runner_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER 1: not with elastic experts"):
        refusals.check(server())


def test_a_scheduler_that_follows_ours_is_taken():
    refusals.check(server(scheduler_cls="emoe_vllm.scheduler.ElasticScheduler"))
