"""Single MoE layers on real GPUs: process groups, layers of either spec with given weights, and one pass of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tests.distributed import ALONE
from tests.tiny import build_layer, hidden_states, layer_config, start

SEQUENCE, BATCH, HIDDEN, EXPERTS = 64, 2, 1024, 8
TOKENS = SEQUENCE * BATCH  # a multiple of every recipe's block
SIZES = {"hidden_size": HIDDEN, "ffn_hidden_size": 512, "moe_ffn_hidden_size": 256, "moe_router_dtype": "fp32"}
ROUTER_SCALE = 4.0  # logits with a deviation of about 2.5: clear ranks, and no weight that rounds to zero
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


@contextmanager
def process_groups(**parallel: int) -> Iterator[int]:
    """NCCL groups of this process (of torchrun's ranks, where it has started it); the value is the rank."""
    from megatron.core import parallel_state

    added = {} if "RANK" in os.environ else ALONE
    os.environ.update(added)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    start(**parallel)
    try:
        yield torch.distributed.get_rank()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        for name in added:
            del os.environ[name]


def local_layer(**settings: Any) -> Any:
    """An elastic layer of the local spec on this GPU, with outputs of about 1."""
    return _enlarged(build_layer(layer_config(**SIZES | settings), router_scale=ROUTER_SCALE).cuda())


def engine_layer(**settings: Any) -> Any:
    """The same of Transformer Engine's spec: experts in one grouped product."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_emoe.model.layer_spec import elastic_layer

    changes = {"use_cpu_initialization": False, "moe_grouped_gemm": True}
    config = layer_config(**SIZES | changes | settings)
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    spec = elastic_layer(get_gpt_layer_with_transformer_engine_spec(num_experts=EXPERTS, moe_grouped_gemm=True))
    layer = spec.submodules.mlp(config, layer_number=1, pg_collection=get_default_pg_collection())
    layer.set_layer_number(1)
    layer.router.weight.data *= ROUTER_SCALE
    return _enlarged(layer.cuda().train())


def _enlarged(layer: Any) -> Any:
    for weight in layer.experts.parameters():
        weight.data *= 3
    return layer


def precision(config: Any) -> Any:
    """The context in which the core runs a layer of this configuration: FP8, or nothing."""
    if not config.fp8:
        return nullcontext()
    from megatron.core.fp8_utils import get_fp8_context

    return get_fp8_context(config)


def one_pass(layer: Any, seed: int = 11) -> dict[str, Tensor]:
    """Output and every gradient of one pass, in fp32."""
    dtype = layer.config.params_dtype
    x = hidden_states(SEQUENCE, BATCH, HIDDEN, seed).detach().to("cuda", dtype).requires_grad_()
    layer.zero_grad()
    with precision(layer.config):
        output = layer(x)[0]
    output.float().square().sum().backward()
    gradients = {name: p.grad.float() for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return gradients | {"input": x.grad.float(), "output": output.detach().float()}


def likeness(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Cosine between the two of each tensor; 1 where both are zero, as of an expert without tokens."""
    assert ours.keys() == theirs.keys()
    return {name: _cosine(ours[name], theirs[name]) for name in ours}


def _cosine(mine: Tensor, other: Tensor) -> float:
    assert mine.isfinite().all() and other.isfinite().all()
    if not mine.any() and not other.any():
        return 1.0
    return torch.nn.functional.cosine_similarity(mine.flatten().double(), other.flatten().double(), dim=0).item()
