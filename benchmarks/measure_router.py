"""Router forward and backward: stock top-k against co-activation sampling, in turn, in one process. See bench.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_emoe.host import mode as host_mode

host_mode.setup([])

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from paired import Step, take_turns  # noqa: E402

from megatron_emoe.routing.active_k import get_active_k  # noqa: E402
from megatron_emoe.routing.router import ElasticRouter  # noqa: E402
from megatron_emoe.routing.transformer_config import ElasticTransformerConfig  # noqa: E402

TOKENS, HIDDEN, EXPERTS, K, POOL = 8192, 2048, 64, 8, 24
WARM_UP = 5


def build(kind: type[TopKRouter], **elastic: object) -> TopKRouter:
    config = ElasticTransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=16,
        num_moe_experts=EXPERTS,
        moe_router_topk=K,
        moe_router_pre_softmax=True,
        moe_aux_loss_coeff=1e-2,
        moe_router_dtype="fp32",
        add_bias_linear=False,
        **elastic,
    )
    torch.manual_seed(1)
    router = kind(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    return router.train()


def in_turn(stock: Callable, elastic: Callable, steps: int) -> dict[str, list[float]]:
    """Seconds of forward and backward pass of both, from what gives a scalar."""

    def step_of(work: Callable[[], torch.Tensor]) -> Step:
        def step(iteration: int) -> None:
            get_active_k().begin_microbatch(iteration, 0)
            work().backward()

        return step

    return take_turns({"stock": step_of(stock), "elastic": step_of(elastic)}, steps, WARM_UP, lambda: None)


def main(steps: int, out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    stock = build(TopKRouter)
    sampling = build(ElasticRouter, emoe_selection="coactivation", emoe_pool_k=POOL, emoe_hr_loss_coeff=0.0)
    with_loss = build(ElasticRouter, emoe_selection="coactivation", emoe_pool_k=POOL)
    hidden = torch.randn(TOKENS, 1, HIDDEN)
    logits = torch.randn(TOKENS, 1, EXPERTS)
    weight = torch.randn(TOKENS, EXPERTS)

    def whole(router: TopKRouter) -> Callable[[], torch.Tensor]:
        return lambda: (router(hidden.requires_grad_())[0] * weight).sum()

    def from_logits(router: TopKRouter) -> Callable[[], torch.Tensor]:
        return lambda: (router.routing(logits.detach().requires_grad_())[0] * weight).sum()

    times = {
        "router, forward + backward": in_turn(whole(stock), whole(sampling), steps),
        "router from logits, forward + backward": in_turn(from_logits(stock), from_logits(sampling), steps),
        "router from logits, with hierarchical loss": in_turn(from_logits(stock), from_logits(with_loss), steps),
    }
    out.write_text(json.dumps({"times": times}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
