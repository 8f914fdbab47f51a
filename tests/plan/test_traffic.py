"""Planned bytes equal those of every collective of a host-mode run."""

import sys
from collections import Counter
from typing import Any

import pytest

from megatron_emoe.plan.layout import layout_of
from megatron_emoe.plan.traffic import stage_transfers
from megatron_emoe.routing.active_k import Place, scheduled_k
from megatron_emoe.settings.elastic_config import ElasticConfig
from tests.distributed import run_ranks
from tests.tiny import flags, train

# Every tensor is a multiple of 64 elements, where Megatron's buffers begin one: nothing is padded between them.
TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "moe_ffn_hidden_size": 32,
    "moe_router_topk": 3,
    "moe_router_dtype": "fp32",
    "bf16": True,
    "use_distributed_optimizer": True,
    "train_iters": 2,
    "vocab_size": 128,
}
MLA = {
    "multi_latent_attention": True,
    "kv_lora_rank": 64,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 16,
    "qk_layernorm": True,
    "emoe_qk_norm": "latent",
    "rope_type": "rope",
}
SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
APART = SPLIT | {"expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2}
STAGES = {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": "moe"}
SHARED = {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True}

LORA = {
    **dict.fromkeys(("num_experts", "moe_ffn_hidden_size")),
    "emoe_lora_experts": 8,
    "emoe_lora_rank": 8,
}

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
BALANCE, LOG = "tokens per expert, for the balancing loss", "logged losses of the layers"
UNCOUNTED = {BALANCE, LOG}  # by a plan: a few hundred bytes a layer

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "EP": (2, {"expert_model_parallel_size": 2}),
    "DP": (2, {}),
    "TP with split experts": (2, SPLIT | SHARED),
    "TP and EP, one dense layer": (2, APART | SHARED | {"moe_layer_freq": "[0,1]"}),
    "TP and EP, recomputed": (2, APART | SHARED | FULL),
    "TP and EP, experts recomputed": (2, APART | SHARED | MOE),
    "TP, norm of whole queries": (2, APART | {"qk_layernorm": True, "emoe_qk_norm": "full"}),
    "TP, latent attention": (2, APART | MLA),
    "PP, tied head": (2, STAGES | {"untie_embeddings_and_output_weights": None}),
    "PP and EP": (4, STAGES | {"expert_model_parallel_size": 2}),
    "PP of uneven stages": (2, STAGES | {"num_layers": 3, "decoder_first_pipeline_num_layers": 1}),
    "TP and EP and DP": (4, APART),
    "TP with a balancing loss": (2, SPLIT | AUX),
    "EP with a balancing loss": (2, {"expert_model_parallel_size": 2} | AUX),
    "TP, low-rank experts": (2, SPLIT | LORA),
    "TP, low-rank experts recomputed": (2, SPLIT | LORA | FULL),
    "DP, low-rank experts": (2, LORA),
    "PP, low-rank experts, tied head": (2, STAGES | LORA | {"untie_embeddings_and_output_weights": None}),
    "ETP alone": (2, {"expert_tensor_parallel_size": 2}),
}


class Counted:
    """Bytes that the collectives of the second step handed over, by kind, on this rank."""

    def __init__(self) -> None:
        self.payloads: Counter[tuple[str, str]] = Counter()
        self.step, self.inside = 0, False

    def add(self, operation: str, group: Any, payload: int) -> None:
        if self.step == 2 and (group is None or group.size() > 1):  # groups of one rank send nothing
            self.payloads[self._kind(operation, group), operation] += payload

    @staticmethod
    def _kind(operation: str, group: Any) -> str:
        """By who takes part; no group may be unknown."""
        from megatron.core import parallel_state as state

        groups = {
            "tensor parallel": (state.get_tensor_model_parallel_group(), state.get_expert_tensor_parallel_group()),
            "all-to-all": (state.get_expert_model_parallel_group(), state.get_expert_tensor_and_model_parallel_group()),
            "data parallel": (
                state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
                state.get_expert_data_parallel_group(partial_expert_data_parallel=True),
            ),
            "pipeline": (state.get_embedding_group(check_initialized=False),),
            BALANCE: (state.get_tensor_and_context_parallel_group(),),
            LOG: (None,),  # all ranks
        }
        for kind, members in groups.items():
            if any(group is member for member in members):
                return kind
        raise AssertionError(f"{operation} over an unknown group of {group.size()} ranks")


def size(tensors: Any) -> int:
    tensors = tensors if isinstance(tensors, list) else [tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


WHOLE = {  # function of torch.distributed -> operation, which argument is the whole tensor
    "all_to_all_single": ("all-to-all", 1),
    "all_gather_into_tensor": ("all-gather", 0),
    "all_gather": ("all-gather", 0),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "all_reduce": ("all-reduce", 0),
}


def watch(counted: Counted) -> None:
    """Count what Megatron hands to torch.distributed, wherever it keeps a reference to its functions."""
    import torch.distributed as dist
    from megatron.training import training

    def counting(original: Any, operation: str, place: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not counted.inside and not (operation == "all-reduce" and args[0].numel() < 8):  # logged values, norms
                group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
                counted.add(operation, group, size(args[place]))
            before, counted.inside = counted.inside, True
            try:
                return original(*args, **kwargs)
            finally:
                counted.inside = before

        return call

    def sends(operations: list[Any]) -> Any:
        if counted.step == 2:
            sent = sum(size(each.tensor) for each in operations if each.op is dist.isend)
            counted.payloads["pipeline", "send"] += sent
        return batch(operations)

    batch, step = dist.batch_isend_irecv, training.train_step
    for name, (operation, place) in WHOLE.items():
        replace(getattr(dist, name), counting(getattr(dist, name), operation, place))
    replace(batch, sends)

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        counted.step += 1
        return step(*args, **kwargs)

    training.train_step = counted_step


def replace(original: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("megatron", "torch.distributed")):
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, new)


def counted_run(words: list[str]) -> tuple[dict, Any]:
    """Payloads of this rank, and the arguments that the model ran with."""
    from megatron.training import get_args

    counted = Counted()
    train(words, False, lambda: watch(counted))
    args = get_args()
    return dict(counted.payloads), args


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_equal_those_of_every_collective(case):
    ranks, changes = CASES[case]
    runs = run_ranks(counted_run, ranks, flags(**TINY | changes))
    args = runs[0][1]
    layout = layout_of(args, ranks)
    counted: Counter = Counter()
    for payloads, _ in runs:
        counted.update(payloads)
    planned: Counter = Counter()
    for stage in range(layout.pp):
        for transfer in stage_transfers(args, layout, stage, args.moe_router_topk, local=True):
            planned[transfer.kind, transfer.operation] += transfer.payload * ranks // layout.pp
    assert {key: value for key, value in counted.items() if value and key[0] not in UNCOUNTED} == dict(planned)
    assert planned
    balanced = layout.tp > 1 and "moe_aux_loss_coeff" in changes
    layers_and_batches = args.num_layers * layout.micro_batches
    assert counted[BALANCE, "all-reduce"] == (ranks * layers_and_batches * args.num_experts * 8 if balanced else 0)


@pytest.mark.slow
def test_bytes_follow_the_k_that_each_layer_drew():
    """The counted step is the second, iteration 1: its draws are known, and a plan at E[k] is their mean over steps."""
    drawn = {"emoe_selection": "prefix", "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 6, "emoe_seed": 5}
    elastic = ElasticConfig(**drawn, emoe_k_draw="layer")
    ks = [scheduled_k(elastic, TINY["moe_router_topk"], Place(1, 0, layer)) for layer in (1, 2)]
    assert len(set(ks)) == 2
    changes = {"expert_model_parallel_size": 2, "emoe_k_draw": "layer"} | drawn
    runs = run_ranks(counted_run, 2, flags(**TINY | changes))
    counted = sum(payloads["all-to-all", "all-to-all"] for payloads, _ in runs)
    transfers = stage_transfers(runs[0][1], layout_of(runs[0][1], 2), 0, sum(ks) / 2, local=True)
    assert counted == 2 * sum(t.payload for t in transfers if t.operation == "all-to-all")


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [False, True], ids=["EP 2", "TP 2"])
def test_a_teacher_sends_what_a_forward_pass_does(tensor, tmp_path):
    """At the model's own k, whatever the micro-batch runs at."""
    layout_words = {"tensor_model_parallel_size": 2, "sequence_parallel": True} if tensor else {}
    layout_words = layout_words or {"expert_model_parallel_size": 2}
    run_ranks(train, 2, flags(**TINY | layout_words | {"save": tmp_path, "save_interval": 2}))
    changes = layout_words | {"emoe_teacher": tmp_path, "load": tmp_path, "finetune": True}
    runs = run_ranks(counted_run, 2, flags(**TINY | changes))
    args = runs[0][1]
    layout = layout_of(args, 2)
    counted: Counter = Counter()
    for payloads, _ in runs:
        counted.update(payloads)
    planned: Counter = Counter()
    for transfer in stage_transfers(args, layout, 0, TINY["moe_router_topk"], local=True):
        planned[transfer.kind, transfer.operation] += transfer.payload * 2
    assert {key: value for key, value in counted.items() if value and key[0] not in UNCOUNTED} == dict(planned)


@pytest.mark.slow
def test_a_second_pass_sends_as_the_first_does():
    """Two micro-batches, each at the model's k and at another one; a plan at the mean k of all passes."""
    drawn = {"emoe_selection": "prefix", "emoe_k_schedule": "stratified", "emoe_k_grid": [1, 5], "emoe_seed": 5}
    elastic = ElasticConfig(**drawn, emoe_second_pass=1.0)
    changes = {"expert_model_parallel_size": 2, "emoe_second_pass": 1.0} | drawn
    runs = run_ranks(counted_run, 2, flags(**TINY | changes))
    args = runs[0][1]
    layout = layout_of(args, 2)
    places = [Place(1, at, 1, layout.micro_batches, second) for at in range(layout.micro_batches) for second in (0, 1)]
    ks = [scheduled_k(elastic, TINY["moe_router_topk"], place) for place in places]
    assert len(set(ks)) > 1
    counted: Counter = Counter()
    for payloads, _ in runs:
        counted.update(payloads)
    planned: Counter = Counter()
    for transfer in stage_transfers(args, layout, 0, sum(ks) / len(ks), local=True):
        planned[transfer.kind, transfer.operation] += transfer.payload * 2
    assert {key: value for key, value in counted.items() if value and key[0] not in UNCOUNTED} == dict(planned)
