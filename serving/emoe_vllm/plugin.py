"""What vLLM calls in every process: the elastic MoE layer, and a hook where a model's configuration is complete.

Both are entries in registries that vLLM keeps for this; nothing of vLLM is replaced. Where a model has no block "emoe"
and nobody asked for it, the hook does nothing and the layer is vLLM's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from emoe_vllm.layers import ARCHITECTURES, k_key
from emoe_vllm.settings import ElasticSettings, asked_for, decide

_RUNNER, _OURS = "VLLM_USE_V2_MODEL_RUNNER", "00"
"""vLLM reads a whole number, so ours is told from a person's 0."""


def register() -> None:
    """The entry point of `vllm.general_plugins`. A second call in a process changes nothing."""
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if "MoERunner" in op_registry_oot:
        return
    from emoe_vllm.runner import ElasticMoERunner

    PluggableLayer.register_oot(ElasticMoERunner, name="MoERunner")
    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP[architecture] = _hook(MODELS_CONFIG_MAP.get(architecture))


def _hook(stock: type | None) -> type:
    """vLLM's own hook of an architecture, where it has one, and then ours."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Elastic(stock or VerifyAndUpdateConfig):  # type: ignore[misc]
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            configure(vllm_config)

    return Elastic


def configure(vllm_config: Any) -> None:
    """Make a server elastic where the model or its flags ask for it.

    Raises:
        ValueError: flag or key, value and rule.
    """
    config = vllm_config.model_config.hf_config
    if not asked_for(config, vllm_config.additional_config):
        _forget()
        return
    if not isinstance(vllm_config.additional_config, dict):
        raise ValueError("--additional-config: must be an object where experts are elastic")
    from emoe_vllm import refusals

    refusals.check(vllm_config)
    settings = decide(config, vllm_config.additional_config, vllm_config.model_config.model)
    vllm_config.additional_config = vllm_config.additional_config | {"emoe": settings.as_json()}
    setattr(config, k_key(config), settings.k_max)  # layers are built for the largest k' and masked down
    refusals.check_scheduler(vllm_config.scheduler_config.scheduler_cls, settings)
    _choose_classes(vllm_config)
    _check_requests(vllm_config, settings)


def _choose_classes(vllm_config: Any) -> None:
    from vllm.platforms import current_platform

    kind = "cpu_worker.ElasticCPUWorker" if current_platform.is_cpu() else "worker.ElasticWorker"
    vllm_config.parallel_config.worker_cls = f"emoe_vllm.{kind}"
    if vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = "emoe_vllm.scheduler.scheduler"
    if not os.environ.get(_RUNNER):
        os.environ[_RUNNER] = _OURS  # its processes inherit it


def _check_requests(vllm_config: Any, settings: ElasticSettings) -> None:
    from emoe_vllm.requests import RequestCheck

    RequestCheck.settings = settings
    checks = list(vllm_config.model_config.logits_processors or [])
    vllm_config.model_config.logits_processors = [*checks, "emoe_vllm.requests:RequestCheck"]


def _forget() -> None:
    """Another engine of this process may have been elastic."""
    if os.environ.get(_RUNNER) == _OURS:
        del os.environ[_RUNNER]
    if (requests := sys.modules.get("emoe_vllm.requests")) is not None:
        requests.RequestCheck.settings = None
