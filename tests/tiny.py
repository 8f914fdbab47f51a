"""Tiny models for the tests of the elastic core: command lines, whole training runs, single MoE layers.

Everything here runs on the ranks of `run_ranks`. What happened inside a model is seen through hooks on the core's own
classes, so that a stock run and an elastic run are recorded by the same code, and none of it by ours.
"""

import contextlib
import io
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim.optimizer import register_optimizer_step_pre_hook

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "vocab_size": 96,
    "make_vocab_size_divisible_by": 8,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": 16,
    "moe_token_dispatcher_type": "alltoall",
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 4,
    "lr": 5e-3,
    "lr_decay_style": "constant",
    "eval_interval": 1000,
    "eval_iters": 0,
    "log_interval": 1,
    "seed": 7,
    "mock_data": True,
    "tokenizer_type": "NullTokenizer",
    "split": "90,5,5",
    "swiglu": True,
    "disable_bias_linear": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "untie_embeddings_and_output_weights": True,
}

COACTIVATION: dict[str, Any] = {"emoe_selection": "coactivation", "emoe_pool_k": 6}
PREFIX: dict[str, Any] = {
    "emoe_selection": "prefix",
    "emoe_k_schedule": "uniform",
    "emoe_k_min": 1,
    "emoe_k_max": 4,
}


def flags(**changes: Any) -> list[str]:
    """The command line of a tiny run: True is a switch, None or False leaves a flag out, a list gives several words."""
    words: list[str] = []
    for name, value in (BASE | changes).items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(part) for part in (value if isinstance(value, list) else [value])]
    return words


class Route(NamedTuple):
    """What a router returned in one forward pass. grad: whether gradients were on (off in a recomputed layer's first
    pass)."""

    step: int
    layer: int
    training: bool
    grad: bool
    probs_TE: Tensor
    map_TE: Tensor


class Rows(NamedTuple):
    """Rows that one rank's experts received in one forward pass."""

    step: int
    layer: int
    training: bool
    grad: bool
    rows: int


@dataclass
class Run:
    """What one rank saw in a training run. losses: mean token loss of each micro-batch on the last pipeline stage."""

    losses: list[float] = field(default_factory=list)
    valid_losses: list[float] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    log: str = ""


class Watch:
    """Fills a Run from hooks that torch calls for every module and every optimizer of this process.

    Names of weights, and numbers of layers and experts in them, are global.
    """

    def __init__(self) -> None:
        self.run = Run()
        self._layer_of: dict[int, int] = {}
        self._chunks: dict[int, nn.Module] = {}
        nn.modules.module.register_module_forward_pre_hook(self._before)
        nn.modules.module.register_module_forward_hook(self._after)
        register_optimizer_step_pre_hook(self._step)

    def _place(self, module: nn.Module) -> tuple[int, int, bool, bool]:
        from megatron.training import get_args

        return get_args().curr_iteration, self._layer_of[id(module)], module.training, torch.is_grad_enabled()

    def _before(self, module: nn.Module, args: tuple) -> None:
        name = type(module).__name__
        if name in ("MoELayer", "ElasticMoELayer"):
            router = module.router
            offset = router.config.num_layers if router.is_mtp_layer else 0
            self._layer_of[id(module.experts)] = module.layer_number + offset
            self._layer_of[id(router)] = module.layer_number + offset
        elif name == "LoraMLP":
            self._layer_of[id(module.router)] = module.router.layer_number
        elif name == "SequentialMLP":
            self.run.rows.append(Rows(*self._place(module), args[0].shape[0]))

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        name = type(module).__name__
        if any(base.__name__ == "TopKRouter" for base in type(module).__mro__):
            self.run.routes.append(Route(*self._place(module), *(tensor.detach().clone() for tensor in output)))
        elif name == "GPTModel":
            self._chunks[id(module)] = module
            if module.post_process:
                losses = self.run.losses if module.training else self.run.valid_losses
                losses.append(output.detach().float().mean().item())

    def _step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.run.gradients.append([gradient.detach().clone() for gradient in gradients])

    def finish(self, log: str) -> Run:
        for chunk in self._chunks.values():
            self.run.weights |= {name: tensor.detach().clone() for name, tensor in global_names(chunk).items()}
        self.run.log = log
        return self.run


def global_names(chunk: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model chunk, named as if one rank held the whole model."""
    from megatron.core import parallel_state

    named = {}
    for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
        words = name.split(".")
        if words[:2] == ["decoder", "layers"]:
            words[2] = str(chunk.decoder.layers[int(words[2])].layer_number - 1)
        if "local_experts" in words:
            place = words.index("local_experts") + 1
            held = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
            words[place] = str(int(words[place]) + held * parallel_state.get_expert_model_parallel_rank())
        named[".".join(words)] = tensor
    return named


def fill_weights() -> None:
    """From now on a built model's weights follow from their global names: the same in every parallel layout."""
    from megatron_emoe.model.layer_spec import ElasticGPTModelBuilder

    build = ElasticGPTModelBuilder.build_model

    def build_and_fill(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = build(self, *args, **kwargs)
        for name, weight in global_names(model).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(weight.shape, generator=generator)
            scale = 0.5 if "router" in name else 0.1
            weight.data.copy_(1 + values / 10 if weight.dim() == 1 else values * scale)
        return model

    ElasticGPTModelBuilder.build_model = build_and_fill


class TinyDataset(torch.utils.data.Dataset):
    """Sequences that can be learnt: each token is the one before plus a step of 1 or 2, a function of the index."""

    def __init__(self, size: int, length: int, vocabulary: int, seed: int) -> None:
        self.size, self.length, self.vocabulary, self.seed = size, length, vocabulary, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        first = torch.randint(self.vocabulary, (1,), generator=generator)
        steps = torch.randint(1, 3, (self.length,), generator=generator)
        text = torch.cat([first, first + steps.cumsum(0)]) % self.vocabulary
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.length),
            "position_ids": torch.arange(self.length),
            "attention_mask": torch.ones(1, self.length, self.length).tril() < 0.5,
        }


def tiny_datasets(sizes: list[int], vp_stage: int | None = None) -> tuple[TinyDataset, ...]:
    """Training, validation and test sequences, as Megatron's dataset provider gives them."""
    from megatron.training import get_args

    args = get_args()
    return tuple(TinyDataset(max(size, 1), args.seq_length, args.vocab_size, 1 + i) for i, size in enumerate(sizes))


tiny_datasets.is_distributed = True


def train(words: list[str], stock: bool = False, prepare: Callable[[], Any] | None = None) -> Run:
    """Run pretrain_emoe.py (or the core's own training: stock) on this rank with these flags and the tiny dataset.

    prepare: called first, to spoil or to watch something.
    """
    if prepare is not None:
        prepare()
    watch, log = Watch(), io.StringIO()
    with contextlib.redirect_stdout(log):
        try:
            _train_stock(words) if stock else _train_elastic(words)
        except SystemExit as leave:
            if leave.code:
                raise
    return watch.finish(log.getvalue())


def _train_elastic(words: list[str]) -> None:
    sys.argv = ["pretrain_emoe.py", *words]
    import pretrain_emoe

    pretrain_emoe.build_datasets = tiny_datasets
    pretrain_emoe.main()


def _train_stock(words: list[str]) -> None:
    from tests import pretrain_stock

    pretrain_stock.build_datasets = tiny_datasets
    pretrain_stock.train(words)


def stored_tensors(folder: Path, iteration: int | None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint (None: a release), whole and by its key: weights and optimizer state."""
    reader = checkpoint.FileSystemReader(folder / ("release" if iteration is None else f"iter_{iteration:07d}"))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def arguments(words: list[str]) -> Namespace:
    """The checked arguments of a command line, as pretrain_emoe.py gets them."""
    from megatron_emoe.host import mode as host_mode
    from megatron_emoe.training.arguments import parse

    sys.argv = ["pretrain_emoe.py", *host_mode.setup(words)]
    with contextlib.redirect_stdout(io.StringIO()):
        return parse()


def start(*, seed: int = 3, **parallel: int) -> None:
    """Make this rank's process groups and seed its random streams; parallel: as initialize_model_parallel takes it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**parallel)
    model_parallel_cuda_manual_seed(seed)


def layer_config(stock: bool = False, **changes: Any) -> Any:
    """Configuration of a single MoE layer with 8 experts, 2 of them active."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_emoe.routing.transformer_config import ElasticTransformerConfig

    settings = {
        "num_layers": 1,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_ffn_hidden_size": 8,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
    }
    return (TransformerConfig if stock else ElasticTransformerConfig)(**(settings | changes))


def build_layer(config: Any, *, seed: int = 5, layer_number: int = 1, router_scale: float = 30.0) -> Any:
    """An ElasticMoELayer (or the core's, for a stock config) in training mode; start() comes first.

    router_scale: the initial router is nearly indifferent; scaled up, its ranks are as clear as those of a trained one.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_emoe.model.layer_spec import elastic_layer
    from megatron_emoe.routing.transformer_config import ElasticTransformerConfig

    spec = get_gpt_layer_local_spec(config.num_moe_experts, moe_grouped_gemm=False)
    if isinstance(config, ElasticTransformerConfig):
        spec = elastic_layer(spec)
    torch.cuda.manual_seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    groups = get_default_pg_collection()
    layer = spec.submodules.mlp(config, layer_number=layer_number, pg_collection=groups)
    layer.set_layer_number(layer_number)
    layer.router.weight.data *= router_scale
    return layer.train()


def hidden_states(sequence: int = 8, batch: int = 2, hidden: int = 16, seed: int = 11) -> Tensor:
    """Input of a layer, fp32 [sequence, batch, hidden], with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequence, batch, hidden, generator=generator).requires_grad_()


def begin(iteration: int = 0, microbatch: int = 0) -> None:
    """Tell the owner of k where training stands, as the loop does before a forward pass."""
    from megatron_emoe.routing.active_k import get_active_k

    get_active_k().begin_microbatch(iteration, microbatch)
