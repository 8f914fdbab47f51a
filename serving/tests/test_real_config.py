"""What is decided and what is refused, on the configuration that the real vLLM makes; no engine is started."""

import json
import pickle

import pytest
import served
from vllm.engine.arg_utils import EngineArgs

from emoe_vllm.budgets import FILE
from emoe_vllm.settings import decided

BLOCK = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}
TABLE = {
    "version": 1,
    "k_train": 2,
    "num_experts": 8,
    "budgets": [
        {"name": "fast", "k": 1, "quality": 0.9, "expert_flops": 0.5},
        {"name": "best", "k": [8, 6], "quality": 1.02, "expert_flops": 3.5},
    ],
}
FOLLOW = {"budgets": TABLE, "follow": {"0": "best", "8": "fast"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save("olmoe", tmp_path_factory.mktemp("config") / "m", BLOCK)


def configured(folder, emoe=None, **options):
    """vLLM's configuration of a server."""
    extra = {} if emoe is None else {"additional_config": {"emoe": emoe}}
    fixed = {"skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32", "enforce_eager": True}
    return EngineArgs(model=str(folder), **(fixed | extra | options)).create_engine_config()


def test_what_is_decided_travels_to_other_processes(folder):
    config = configured(folder, FOLLOW | {"k": "best"})
    for found in (config, pickle.loads(pickle.dumps(config))):
        settings = decided(found.additional_config)
        assert settings.k == (8, 6) and settings.follow.ks == ((8, 6), 1) and settings.follow.starts == (0, 8)
        assert [budget.name for budget in settings.budgets] == ["fast", "best"]
        assert found.model_config.hf_config.num_experts_per_tok == settings.k_max == 8
        assert found.scheduler_config.scheduler_cls == "emoe_vllm.scheduler.scheduler"
    assert decided(json.loads(json.dumps(config.additional_config))) == settings


def test_the_table_beside_config_json(folder, tmp_path):
    beside, path = folder / FILE, tmp_path / "mine.json"
    beside.write_text(json.dumps(TABLE))
    path.write_text(json.dumps(TABLE | {"budgets": TABLE["budgets"][:1]}))
    try:
        assert decided(configured(folder, {"k": "best"}).additional_config).k == (8, 6)
        assert decided(configured(folder, {"k": "fast", "budgets": str(path)}).additional_config).k == 1
        assert decided(configured(folder, {"budgets": False}).additional_config).budgets == ()
        beside.write_text(json.dumps(TABLE | {"k_train": 4}))
        with pytest.raises(ValueError, match=f"{beside}: k_train 4: is another model's; this one has 2"):
            configured(folder)
    finally:
        beside.unlink()


def test_a_scheduler_of_ones_own(folder):
    ours = "emoe_vllm.following.FollowingScheduler"
    assert configured(folder, FOLLOW, scheduler_cls=ours).scheduler_config.scheduler_cls == ours
    with pytest.raises(ValueError, match=f"--scheduler-cls {ours}: has nothing to follow without --additional-config"):
        configured(folder, scheduler_cls=ours)
    plain = "emoe_vllm.scheduler.ElasticScheduler"
    with pytest.raises(ValueError, match=f"--scheduler-cls {plain}: does not follow the load; with"):
        configured(folder, FOLLOW, scheduler_cls=plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "--enable-lora True: not with elastic experts"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "--speculative-config True: not with elastic experts, drafted tokens have no budget",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config True: not with elastic experts",
        ),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls vllm.v1.*: not with elastic"),
        ({"worker_cls": "mine.Worker"}, "--worker-cls mine.Worker: not with elastic experts"),
        ({"data_parallel_size": 2}, "--data-parallel-size 2: not with elastic experts"),
        ({"moe_backend": "flashinfer_trtllm"}, "--moe-backend flashinfer_trtllm: not with elastic experts"),
        ({"runner": "pooling"}, "--runner pooling True: not with elastic experts"),
    ],
)
def test_what_cannot_work_is_refused_by_name(folder, options, message):
    with pytest.raises(ValueError, match=message):
        configured(folder, **options)


@pytest.mark.parametrize(
    ("emoe", "message"),
    [
        ({"k": 9}, r"--additional-config emoe.k 9: must be a whole number in \[1, 8\]"),
        ({"budgets": TABLE, "k": "bset"}, r"emoe.k 'bset': must be one of fast, best, or a whole number in \[1, 8\]"),
        ({"budgets": "/nowhere.json"}, "/nowhere.json: cannot be read: No such file"),
        (
            FOLLOW | {"min_quality": 1.1},
            "emoe.follow.0 .8, 6.: has a quality of 1.02; must be at least min_quality, 1.1",
        ),
    ],
)
def test_a_flag_that_cannot_be_is_refused(folder, emoe, message):
    with pytest.raises(ValueError, match=message):
        configured(folder, emoe)
