"""One optimizer step of Megatron's loop: stock top-k against elastic, in turn, in one process. See bench.py."""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_emoe import host_mode

STEPS, OUT = int(sys.argv[1]), Path(sys.argv[2])
FLAGS = """--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
    --num-experts 32 --moe-router-topk 4 --moe-ffn-hidden-size 256 --ffn-hidden-size 256 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --vocab-size 2048
    --moe-aux-loss-coeff 1e-2 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --mock-data
    --tokenizer-type NullTokenizer --micro-batch-size 2 --global-batch-size 8 --train-iters 1000 --lr 1e-4
    --log-interval 1000000 --eval-iters 0 --no-create-attention-mask-in-dataloader"""
ELASTIC = ["--emoe-selection", "coactivation", "--emoe-pool-k", "12"]
sys.argv[1:] = host_mode.setup([*FLAGS.split(), *ELASTIC])

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.training import setup_model_and_optimizer, train_step  # noqa: E402

from megatron_emoe.arguments import parse  # noqa: E402
from megatron_emoe.layer_spec import elastic_model_config  # noqa: E402
from megatron_emoe.training import ElasticLoop  # noqa: E402

WARM_UP = 5


def build(args: Namespace, config: object, loop: ElasticLoop, batches: Iterator) -> Callable[[int], None]:
    """A model with its optimizer; the returned function does one step."""
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.train()

    def step(iteration: int) -> None:
        args.curr_iteration = iteration
        forward_backward = get_forward_backward_func()
        train_step(
            loop.forward_step,
            batches,
            model,
            optimizer,
            scheduler,
            get_model_config(model[0]),
            forward_backward,
            iteration,
        )

    return step


def random_batches(args: Namespace) -> Iterator[dict[str, torch.Tensor]]:
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        tokens = torch.randint(0, 2048, shape)
        yield {
            "tokens": tokens,
            "labels": tokens.roll(-1, 1),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).repeat(shape[0], 1),
        }


def count_bytes(step: Callable[[int], None], iteration: int) -> int:
    """Bytes that all ranks together hand to the all-to-all in one step, each rank's share to itself included."""
    sent, send = [], torch.distributed.all_to_all_single

    def counting(output: torch.Tensor, tensor: torch.Tensor, *rest: object, **named: object) -> object:
        sent.append(tensor.numel() * tensor.element_size())
        return send(output, tensor, *rest, **named)

    torch.distributed.all_to_all_single = counting
    try:
        step(iteration)
    finally:
        torch.distributed.all_to_all_single = send
    total = torch.tensor(sum(sent))
    torch.distributed.all_reduce(total)
    return int(total)


def main() -> None:
    args = parse()
    initialize_megatron()
    elastic_config = elastic_model_config(args)
    loop = ElasticLoop(args, elastic_config.transformer)
    batches = RerunDataIterator(random_batches(args))
    variants = {
        "stock": build(args, gpt_config_from_args(args), loop, batches),
        "elastic": build(args, elastic_config, loop, batches),
    }
    times: dict[str, list[float]] = {"stock": [], "elastic": []}
    for iteration in range(WARM_UP + STEPS):
        for name in ("stock", "elastic") if iteration % 2 else ("elastic", "stock"):
            torch.distributed.barrier()
            start = time.perf_counter()
            variants[name](iteration)
            torch.distributed.barrier()
            if iteration >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    sent = {name: count_bytes(step, WARM_UP + STEPS) for name, step in variants.items()}
    if torch.distributed.get_rank() == 0:
        OUT.write_text(json.dumps({"times": {"optimizer step": times}, "bytes": sent}))


if __name__ == "__main__":
    main()
