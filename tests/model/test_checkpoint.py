"""Checks of --load against folders made here and one checkpoint that the core saved."""

import copy
import re
import shutil
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_emoe.model import checkpoint, recovery
from megatron_emoe.model.checkpoint import check_load, elastic_changes, iteration_of, locate, stored_args
from megatron_emoe.model.stored_model import check_shape, model_flags
from megatron_emoe.settings.elastic_config import ElasticConfig
from tests.distributed import run_ranks

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "num_experts": 8,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "moe_layer_freq": 1,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_layernorm": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "swiglu": True,
    "normalization": "RMSNorm",
    "untie_embeddings_and_output_weights": True,
    "moe_router_enable_expert_bias": False,
    "moe_router_topk": 2,
}
COACTIVATION = {"emoe_selection": "coactivation", "emoe_pool_k": 6}


def namespace(**changes) -> Namespace:
    """Arguments of a run of the model above; `changes` on top."""
    run = {
        "load": None,
        "save": None,
        "ckpt_step": None,
        "ckpt_format": "torch_dist",
        "finetune": False,
        "skip_train": False,
        "pretrained_checkpoint": None,
        "no_load_optim": False,
        "no_save_optim": False,
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": False,
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": False,
        "global_batch_size": 8,
        "train_iters": 4,
    } | dict.fromkeys(checkpoint.LAYOUT_FLAGS, 1)
    run |= dict.fromkeys(("train_samples", "lr_decay_style", "lr_decay_iters", "lr_warmup_fraction", "lr"))
    run |= dict.fromkeys(("start_weight_decay", "end_weight_decay", "weight_decay_incr_style", "lr_warmup_iters"), 0)
    return Namespace(**MODEL | run | ElasticConfig().settings() | changes)


def refuses(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def folder_of_checkpoints(folder: Path, tracker: str | bytes, *names: str) -> Path:
    """A --save folder as the core lays it out: tracker file and checkpoint folders."""
    folder.mkdir(exist_ok=True)
    content = tracker if isinstance(tracker, bytes) else tracker.encode()
    (folder / "latest_checkpointed_iteration.txt").write_bytes(content)
    for name in names:
        (folder / name).mkdir()
    return folder


# Where the checkpoint is.


@pytest.mark.parametrize(
    ("tracker", "step", "expected"),
    [
        ("40", None, "iter_0000040"),
        ("40\n", None, "iter_0000040"),
        ("40", 20, "iter_0000020"),
        ("release", None, "release"),
        ("release", 20, "iter_0000020"),
    ],
)
def test_locate(tmp_path, tracker, step, expected):
    folder = folder_of_checkpoints(tmp_path / "run", tracker, "iter_0000020", "iter_0000040", "release")
    assert locate(str(folder), step) == folder / expected


def test_the_iteration_is_in_the_folder_s_name():
    assert iteration_of(Path("/runs/iter_7/iter_0000040")) == 40
    assert iteration_of(Path("/runs/iter_7/release")) == 0


def test_locate_without_a_folder_or_checkpoint(tmp_path):
    with refuses(f"--load {tmp_path}/none: no such folder"):
        locate(f"{tmp_path}/none")
    with refuses(f"--load {tmp_path}: no checkpoint in it (latest_checkpointed_iteration.txt is missing)"):
        locate(str(tmp_path))


def test_locate_what_is_named_but_missing(tmp_path):
    folder = folder_of_checkpoints(tmp_path / "run", "40", "iter_0000020")
    named = "latest_checkpointed_iteration.txt names it"
    with refuses(f"--load {folder}: iter_0000040 is missing, although {named}"):
        locate(str(folder))
    with refuses(f"--load {folder}: iter_0000030 is missing, although --ckpt-step names it"):
        locate(str(folder), 30)


@pytest.mark.parametrize(
    ("content", "shown"), [("", "''"), ("-1", "'-1'"), ("forty", "'forty'"), (b"\xff\x00", r"'\ufffd\x00'")]
)
def test_locate_with_a_damaged_tracker(tmp_path, content, shown):
    folder = folder_of_checkpoints(tmp_path / "run", content, "iter_0000040")
    shown = shown.replace(r"\ufffd", "\ufffd")
    rule = "which is neither a number nor 'release'"
    with refuses(f"--load {folder}: latest_checkpointed_iteration.txt holds {shown}, {rule}"):
        locate(str(folder))


# What it was saved with.


def save_one(folder: str, args: Namespace) -> None:
    """Save a torch_dist checkpoint whose common part holds these arguments, as the core's save_checkpoint does."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel()
    Path(folder).mkdir(parents=True)
    tensor = dist_checkpointing.ShardedTensor.from_rank_offsets("weight", torch.ones(4))
    dist_checkpointing.save({"args": args, "iteration": 40, "weight": tensor}, folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A --load folder with one checkpoint of iteration 40, saved under co-activation sampling."""
    folder = folder_of_checkpoints(tmp_path_factory.mktemp("checkpoint") / "run", "40")
    run_ranks(save_one, 1, str(folder / "iter_0000040"), namespace(**COACTIVATION))
    return folder


def test_stored_args_of_a_saved_checkpoint(saved):
    assert vars(stored_args(locate(str(saved)))) == vars(namespace(**COACTIVATION))


def test_a_saved_checkpoint_is_checked_without_a_process_group(saved):
    check_load(namespace(**COACTIVATION, load=str(saved)))
    with pytest.raises(
        ValueError, match=r"elastic settings differ from the stored ones: --emoe-pool-k: stored 6, now 5"
    ):
        check_load(namespace(**COACTIVATION | {"emoe_pool_k": 5}, load=str(saved)))
    with refuses(f"--num-layers 3: the checkpoint in --load {saved} was saved with 2"):
        check_load(namespace(**COACTIVATION, load=str(saved), num_layers=3))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:20])


def no_data(folder: Path) -> None:
    for file in folder.glob("*.distcp"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (empty, r"not a torch_dist checkpoint \(\.metadata is missing\)$"),
        (lambda folder: (folder / ".metadata").unlink(), r"not a torch_dist checkpoint \(\.metadata is missing\)$"),
        (cut_metadata, r"not a readable torch_dist checkpoint \(.+\)$"),
        (no_data, r"not a readable torch_dist checkpoint \(.*__0_0\.distcp.*\)$"),
    ],
    ids=["empty", "no metadata", "cut metadata", "no data"],
)
def test_damaged_checkpoints(saved, tmp_path, damage, reason):
    broken = tmp_path / "iter_0000040"
    shutil.copytree(saved / "iter_0000040", broken)
    damage(broken)
    with pytest.raises(ValueError, match=f"^--load {re.escape(str(broken))}: {reason}") as raised:
        stored_args(broken)
    assert "\n" not in str(raised.value)  # one line, not torch's traceback


def test_another_source_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^--pretrained-checkpoint .*: not a torch_dist checkpoint"):
        stored_args(tmp_path, source="--pretrained-checkpoint")


# Whether the stored run and this one fit. `stored` is patched in: no file is read.


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """A function that makes a --load folder whose checkpoint was saved with a namespace."""

    def make(args: Namespace, name: str = "run") -> str:
        folder = folder_of_checkpoints(tmp_path / name, "40", "iter_0000040")
        monkeypatch.setattr(checkpoint, "stored_args", lambda *_, **known: args)
        monkeypatch.setattr(recovery, "damage", lambda path: None)
        return str(folder)

    return make


def check(args: Namespace) -> list[str]:
    said: list[str] = []
    check_load(args, report=said.append)
    return said


def test_the_same_settings_go_on(stored):
    assert check(namespace(**COACTIVATION, load=stored(namespace(**COACTIVATION)))) == []


def test_a_changed_setting_is_refused_with_both_values(stored):
    folder = stored(namespace(**COACTIVATION))
    with refuses(
        f"--load {folder}: elastic settings differ from the stored ones: --emoe-pool-k: stored 6, now 8; "
        "--emoe-hr-loss-coeff: stored None, now 0.01; --moe-router-topk: stored 2, now 4. "
        "Keep them to continue this run, or start a new one from its weights with --finetune"
    ):
        check(
            namespace(
                load=folder, **COACTIVATION | {"emoe_pool_k": 8, "emoe_hr_loss_coeff": 0.01, "moe_router_topk": 4}
            )
        )


TP, PP, EP, ETP = checkpoint.LAYOUT_FLAGS
BY_PARAMETER = {"dist_ckpt_optim_fully_reshardable": True}
# What Megatron 0.19 takes and what it dies of, tried on two and four ranks of host mode.
LAYOUTS = [
    ({}, {EP: 2}, EP),
    ({EP: 4}, {EP: 2}, EP),
    ({TP: 2, ETP: 2}, {}, TP),
    ({}, {PP: 2}, PP),
    ({TP: 2, ETP: 2}, {TP: 2, ETP: 1}, ETP),
    (BY_PARAMETER | {TP: 2, ETP: 2}, {}, None),
    (BY_PARAMETER | {TP: 2, EP: 2}, {PP: 2, EP: 4}, None),
    (BY_PARAMETER, {EP: 2}, EP),
    (BY_PARAMETER | {EP: 2}, {}, EP),
    ({"use_distributed_optimizer": False}, {PP: 2}, None),
    ({"use_distributed_optimizer": False, EP: 2}, {}, EP),
    ({"no_save_optim": True}, {PP: 2}, None),
    ({}, {PP: 2, "no_load_optim": True}, None),
    ({}, {PP: 2, "finetune": True}, None),
]


@pytest.mark.parametrize(("old", "new", "refused"), LAYOUTS)
def test_a_layout_that_cannot_take_the_optimizer_state_is_refused(stored, old, new, refused):
    folder, args = stored(namespace(**old)), namespace(**new)
    args.load, args.use_distributed_optimizer = folder, old.get("use_distributed_optimizer", True)
    if refused is None:
        assert check(args) == []
        return
    state = f"the optimizer state in --load {folder} was saved with {old.get(refused, 1)}, and this run cannot take it"
    with refuses(
        f"--{refused.replace('_', '-')} {new.get(refused, 1)}: {state}; "
        "keep the layout (jobs of slurm/: set EMOE_LAYOUT)"
    ):
        check(args)


def test_finetune_starts_a_new_run_and_is_told(stored):
    folder = stored(namespace(**COACTIVATION))
    assert check(namespace(load=folder, finetune=True)) == [
        "elastic setting changed: --emoe-selection: stored coactivation, now topk",
        "elastic setting changed: --emoe-pool-k: stored 6, now None",
    ]


NO_ELASTIC_SETTING = [
    *("emoe_eval_k", "emoe_coactivation_interval", "emoe_router_watch", "emoe_gradient_check"),
    *("emoe_qk_norm", "emoe_clip_qkv"),
]


@pytest.mark.parametrize("name", [field.name for field in fields(ElasticConfig)])
def test_every_setting_but_measurements_and_model_features_counts(name):
    new = namespace()
    setattr(new, name, "something else")
    expected = [f"--{name.replace('_', '-')}: stored {getattr(namespace(), name)}, now something else"]
    assert elastic_changes(new, namespace()) == ([] if name in NO_ELASTIC_SETTING else expected)


def test_a_checkpoint_of_the_core_is_one_of_plain_top_k():
    core = Namespace(**MODEL)
    assert elastic_changes(namespace(), core) == []
    assert elastic_changes(namespace(**COACTIVATION), core) == [
        "--emoe-selection: stored topk, now coactivation",
        "--emoe-pool-k: stored None, now 6",
    ]


OTHER_MODELS = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 16,
    "num_experts": 16,
    "moe_ffn_hidden_size": 8,
    "moe_shared_expert_intermediate_size": 48,
    "moe_layer_freq": 2,
    "multi_latent_attention": True,
    "kv_lora_rank": 64,
    "qk_layernorm": True,
    "add_qkv_bias": True,
    "position_embedding_type": "none",
    "swiglu": False,
    "normalization": "LayerNorm",
    "untie_embeddings_and_output_weights": False,
    "moe_router_enable_expert_bias": True,
}


@pytest.mark.parametrize(("name", "value"), OTHER_MODELS.items())
def test_another_model_is_refused(stored, name, value):
    folder = stored(namespace())
    flag = "--" + name.replace("_", "-")
    with refuses(f"{flag} {value}: the checkpoint in --load {folder} was saved with {MODEL[name]}"):
        check(namespace(load=folder, finetune=True, **{name: value}))


FEATURES = [
    ({"emoe_qk_norm": "core"}, {"emoe_qk_norm": "full"}, "--emoe-qk-norm full: {} with core"),
    ({"emoe_qk_norm": "full"}, {"emoe_qk_norm": "latent"}, "--emoe-qk-norm latent: {} with full"),
    ({"emoe_clip_qkv": 8.0}, {"emoe_clip_qkv": 4.0}, "--emoe-clip-qkv 4.0: {} with 8.0"),
    ({"emoe_clip_qkv": 8.0}, {"emoe_clip_qkv": None}, "--emoe-clip-qkv is not given: {} with 8.0"),
    ({"emoe_clip_qkv": None}, {"emoe_clip_qkv": 4.0}, "--emoe-clip-qkv 4.0: {} without it"),
]


@pytest.mark.parametrize(("old", "new", "message"), FEATURES, ids=[message.format("was") for *_, message in FEATURES])
@pytest.mark.parametrize("continues", [True, False], ids=["continue", "finetune"])
def test_another_model_feature_is_refused(stored, old, new, message, continues):
    folder = stored(namespace(**old))
    with refuses(message.format(f"the checkpoint in --load {folder} was saved")):
        check(namespace(load=folder, finetune=not continues, **new))
    assert check(namespace(load=folder, finetune=not continues, **old)) == []


def test_a_checkpoint_of_the_core_has_no_model_feature():
    check_shape(namespace(), Namespace(**MODEL), "--load x")
    for feature in ({"emoe_qk_norm": "full"}, {"emoe_clip_qkv": 4.0}):
        with pytest.raises(ValueError, match="the checkpoint in --load x was saved"):
            check_shape(namespace(**feature), Namespace(**MODEL), "--load x")


def test_a_part_of_the_model_left_out_is_refused():
    # The core would load the rest and drop the shared expert's weights.
    with refuses("--moe-shared-expert-intermediate-size is not given: the checkpoint in --load x was saved with 24"):
        check_shape(namespace(moe_shared_expert_intermediate_size=None), namespace(), "--load x")


def test_what_an_older_checkpoint_does_not_say_is_not_compared():
    stored_run = namespace(kv_channels=None)
    del stored_run.qk_layernorm
    check_shape(namespace(qk_layernorm=True, kv_channels=16), stored_run, "--load x")


def test_query_groups_count_only_where_they_are_used():
    # Without --group-query-attention every head has its own, and the core writes their number, 4, into what it saves.
    heads = {"group_query_attention": False, "num_query_groups": 4}
    check_shape(namespace(**heads | {"num_query_groups": 1}), namespace(**heads), "--load x")
    with refuses("--num-query-groups 2: the checkpoint in --load x was saved with 4"):
        check_shape(namespace(), namespace(**heads), "--load x")


# First starts, restarts, other people's weights.


def test_no_load():
    assert check(namespace()) == []
    with refuses("--finetune is given without --load: there is nothing to continue from"):
        check(namespace(finetune=True))


def test_first_start_of_a_job_that_restarts_itself(tmp_path):
    assert check(namespace(load=f"{tmp_path}/run", save=f"{tmp_path}/run")) == []
    with refuses(f"--load {tmp_path}/run: no such folder"):
        check(namespace(load=f"{tmp_path}/run", save=f"{tmp_path}/other"))
    with refuses(f"--load {tmp_path}/run: no such folder"):  # with --finetune there must be weights
        check(namespace(load=f"{tmp_path}/run", save=f"{tmp_path}/run", finetune=True))


def test_restart_is_checked(stored):
    folder = stored(namespace(**COACTIVATION))
    with pytest.raises(ValueError, match="elastic settings differ"):
        check(namespace(load=folder, save=folder))


@pytest.mark.parametrize("how", ["anew", "from weights", "elsewhere"])
def test_a_folder_with_checkpoints_of_another_run_is_not_written_into(how, stored, tmp_path):
    held, weights = stored(namespace(), "held"), stored(namespace(), "weights")  # of iteration 40
    changes = {
        "anew": {},
        "from weights": {"load": held, "finetune": True},
        "elsewhere": {"load": weights},
    }[how]
    with refuses(
        f"--save {held}: holds iteration 40 of another run, which this one would overwrite: go on from there with "
        f"--load {held} (without --finetune), or name another folder"
    ):
        check(namespace(save=held, **changes))
    assert check(namespace(save=str(tmp_path / "fresh"), **changes)) == []
    for same in (f"{held}/", f"{held}/../held"):  # the same folder, by another name
        assert check(namespace(save=same, load=held)) == []


def test_a_folder_with_nothing_whole_or_with_a_model_to_start_from(tmp_path, stored):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("40")  # its folder is gone
    assert check(namespace(save=str(tmp_path))) == []
    tracker.write_text("release")
    with refuses(f"--save {tmp_path}: holds a model to start from, which would be lost: name another folder"):
        check(namespace(save=str(tmp_path)))
    assert check(namespace(save=stored(namespace(), "held"), skip_train=True)) == []


def test_pretrained_checkpoint(stored, tmp_path):
    weights = stored(namespace(**COACTIVATION), "weights")
    fresh = f"{tmp_path}/run"
    # Nothing is saved yet: the weights come from the other folder, and it is a new run.
    said = check(namespace(load=fresh, save=fresh, pretrained_checkpoint=weights))
    assert said[0] == "elastic setting changed: --emoe-selection: stored coactivation, now topk"
    with refuses(f"--num-layers 3: the checkpoint in --pretrained-checkpoint {weights} was saved with 2"):
        check(namespace(load=fresh, save=fresh, pretrained_checkpoint=weights, num_layers=3))
    with refuses(f"--pretrained-checkpoint {fresh}: no such folder"):
        check(namespace(load=fresh, save=fresh, pretrained_checkpoint=fresh))
    # Something is saved: the restart goes on from there, not from the weights.
    with pytest.raises(ValueError, match=f"^--load {re.escape(weights)}: elastic settings differ"):
        check(namespace(load=weights, save=weights, pretrained_checkpoint=fresh))


def test_ckpt_step_is_of_load_alone(stored, tmp_path):
    weights = stored(namespace(), "weights")  # has iteration 40 only
    fresh = f"{tmp_path}/run"
    assert check(namespace(load=fresh, save=fresh, pretrained_checkpoint=weights, ckpt_step=30)) == []
    with refuses(f"--load {weights}: iter_0000030 is missing, although --ckpt-step names it"):
        check(namespace(load=weights, ckpt_step=30))


# The model's flags for a tool that evaluates.


def test_model_flags_are_the_model_and_nothing_of_how_to_run_it():
    run = {"qk_layernorm": True, "norm_epsilon": 1e-6, "recompute_granularity": "full", "attention_dropout": 0.1}
    flags = model_flags(copy.copy(namespace(**COACTIVATION, **run, tensor_model_parallel_size=4, lr=1e-3)))
    model = {"num_layers", "num_experts", "moe_router_topk", "swiglu", "qk_layernorm", "emoe_pool_k", "kv_lora_rank"}
    assert model <= set(flags)
    assert flags["emoe_pool_k"] == 6 and flags["qk_layernorm"] is True
    assert not {"tensor_model_parallel_size", "recompute_granularity", "attention_dropout", "lr", "load"} & set(flags)
