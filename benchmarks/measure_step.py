"""One optimizer step of Megatron's loop: stock top-k against elastic, in turn, in one process. See bench.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_emoe.host import mode as host_mode

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
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from paired import take_turns  # noqa: E402
from paired_models import build, random_batches  # noqa: E402

from megatron_emoe.model.layer_spec import elastic_model_config  # noqa: E402
from megatron_emoe.training.arguments import parse  # noqa: E402
from megatron_emoe.training.loop import ElasticLoop  # noqa: E402

WARM_UP = 5


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
    batches = RerunDataIterator(random_batches(args, vocabulary=2048))
    configs = {"stock": gpt_config_from_args(args), "elastic": elastic_config}
    variants = {name: build(args, config, loop.forward_step, batches)[1] for name, config in configs.items()}
    times = take_turns(variants, STEPS, WARM_UP, torch.distributed.barrier)
    sent = {name: count_bytes(step, WARM_UP + STEPS) for name, step in variants.items()}
    if torch.distributed.get_rank() == 0:
        OUT.write_text(json.dumps({"times": {"optimizer step": times}, "bytes": sent}))


if __name__ == "__main__":
    main()
