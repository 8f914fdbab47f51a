"""What cannot work with a k' that changes, refused by name before anything is built."""

from __future__ import annotations

import os
from typing import Any

from emoe_vllm.settings import FLAG, ElasticSettings

_FIXED_K = "its kernels or layers take one k for all tokens"
_TOKENS = "the layers with experts would see other tokens than the worker knows the budgets of"


def check(vllm_config: Any) -> None:
    """ValueError with flag, value and reason for the first setting of a server that elastic serving cannot have."""
    for flag, value, reason in _settings(vllm_config):
        if value:
            raise ValueError(f"{flag} {value}: not with elastic experts, {reason}")


def _settings(config: Any) -> list[tuple[str, Any, str]]:
    parallel, scheduling = config.parallel_config, config.scheduler_config
    backend = config.kernel_config.moe_backend
    return [
        ("--data-parallel-size", parallel.data_parallel_size > 1 and parallel.data_parallel_size, _TOKENS),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1, _TOKENS),
        ("sequence parallelism of experts", parallel.use_sequence_parallel_moe, _TOKENS),
        ("--enable-dbo", parallel.enable_dbo, _TOKENS),
        ("--ubatch-size", parallel.ubatch_size > 1 and parallel.ubatch_size, _TOKENS),
        ("--enable-eplb", parallel.enable_eplb, "experts past a token's k' would count as load"),
        (
            "--enable-lora",
            config.lora_config is not None,
            "experts with adapters run at the k that they were built for",
        ),
        ("--speculative-config", config.speculative_config is not None, "drafted tokens have no budget"),
        ("--kv-transfer-config", config.kv_transfer_config is not None, "another server's blocks may be of another k'"),
        ("--moe-backend", backend in ("flashinfer_trtllm", "flashinfer_b12x") and backend, _FIXED_K),
        ("--quantization", _quantised_monolithic(config), "kernels that route by themselves"),
        ("--enable-return-routed-experts", _returns_experts(config), "it expects k experts of every token"),
        ("--worker-cls", parallel.worker_cls != "auto" and parallel.worker_cls, "the plugin has its own"),
        ("--scheduler-cls", _other_scheduler(scheduling.scheduler_cls), "it must be a subclass of the plugin's"),
        ("VLLM_USE_V2_MODEL_RUNNER", _wants_v2(), "the second model runner is not supported"),
        ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"), "no router"),
        ("--runner pooling", config.model_config.runner_type == "pooling", "requests to pool have no k'"),
    ]


def check_scheduler(found: Any, settings: ElasticSettings) -> None:
    """ValueError where a scheduler of one's own does not do what the flag asks for, or asks for what the flag lacks."""
    if found is None:
        return
    from emoe_vllm.following import Following

    follows = issubclass(_imported(found), Following)
    if follows and settings.follow is None:
        raise ValueError(f"--scheduler-cls {found}: has nothing to follow without {FLAG}.follow")
    if settings.follow is not None and not follows:
        raise ValueError(
            f"--scheduler-cls {found}: does not follow the load; with {FLAG}.follow it must be a subclass of "
            "emoe_vllm.following.FollowingScheduler or FollowingAsyncScheduler, or be left out"
        )


def _quantised_monolithic(config: Any) -> Any:
    method = config.model_config.quantization
    return method if method in ("mxfp4", "gpt_oss_mxfp4") else None


def _returns_experts(config: Any) -> bool:
    return bool(getattr(config.model_config, "enable_return_routed_experts", False))


def _other_scheduler(found: Any) -> Any:
    """A scheduler that is none of ours. Names are imported: whoever derives a policy says where it is."""
    if found is None:
        return None
    from emoe_vllm.scheduler import ElasticScheduling

    kind = _imported(found)
    return None if isinstance(kind, type) and issubclass(kind, ElasticScheduling) else found


def _imported(found: Any) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(found) if isinstance(found, str) else found


def _wants_v2() -> Any:
    value = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "")
    return value if value.strip("0") else None
