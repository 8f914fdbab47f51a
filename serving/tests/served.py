"""Tiny random models in the real vLLM on CPU, and what transformers with megatron_emoe's hooks gives for them."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig, Qwen3MoeConfig

from megatron_emoe.hf.active_experts import set_active_experts

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
"""Of a log-probability in fp32. Random models of this size differ by about 2e-6."""
PROMPT = 40
"""Tokens; more than a block of the key-value cache."""
BLOCK = 32

# pytest takes the folder of these tests for the package `tests`; what is loaded here imports its neighbours from there.
importlib.import_module("tests").__path__.append(str(ROOT / "tests"))
_spec = importlib.util.spec_from_file_location("hf_models", ROOT / "tests/hf_models.py")
assert _spec is not None and _spec.loader is not None
hf_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hf_models)

# vLLM's kernels on a CPU take heads of 32 and more, and widths that 32 divides.
_WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
_SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 32},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "deepseek_v2": {"moe_intermediate_size": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "ernie4_5_moe": {"moe_intermediate_size": 32},
}
_OTHERS = {
    "qwen3_moe": lambda sizes: Qwen3MoeConfig(
        **sizes, moe_intermediate_size=32, num_experts=8, head_dim=32, norm_topk_prob=True, decoder_sparse_step=1
    ),
    "glm4_moe": lambda sizes: Glm4MoeConfig(
        **sizes,
        n_routed_experts=8,
        n_group=4,
        topk_group=3,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        head_dim=32,
    ),
    "mixtral": lambda sizes: MixtralConfig(**sizes, num_local_experts=8),
}


def save(model_type: str, folder: Path, block: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A random model with 8 experts and k = 2; `block` is what an export leaves in its config.json."""
    if model_type in _OTHERS:
        _save_other(model_type, folder, changes)
    else:
        hf_models.save(model_type, folder, **(_WIDE | _SHAPES[model_type] | changes))
    config = json.loads((folder / "config.json").read_text())
    if block is not None:
        (folder / "config.json").write_text(json.dumps(config | {"emoe": dict(block)}, indent=2))
    return folder


def _save_other(model_type: str, folder: Path, changes: Mapping[str, Any]) -> None:
    sizes = {"vocab_size": 128, "num_hidden_layers": 2, "intermediate_size": 32, "num_experts_per_tok": 2}
    config = _OTHERS[model_type](_WIDE | sizes | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*sorted(model.named_parameters()), *sorted(model.named_buffers())]:
            if name.endswith("inv_freq"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.25 * noise if "norm" in name else 1.5 * noise / tensor.shape[-1] ** 0.5)
    model.save_pretrained(folder)


def tokens(seed: int = 1, length: int = PROMPT) -> list[int]:
    """A random prompt."""
    return hf_models.tokens(batch=1, length=length, seed=seed)[0].tolist()


@contextmanager
def engine(folder: Path, emoe: Any = None, **options: Any) -> Iterator[Any]:
    """An `LLM` in this process. emoe: what stands in --additional-config, None: nothing."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    asked = {} if emoe is None else {"additional_config": {"emoe": emoe}}
    fixed = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 256, "seed": 0}
    llm = LLM(str(folder), **(fixed | {"kv_cache_memory_bytes": 1 << 25, "block_size": BLOCK} | asked | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def params(length: int = 1, prompt: bool = True, **extra: Any) -> Any:
    """Greedy sampling with the log-probabilities of what is written, and of the `prompt`: these need every position
    computed, so vLLM then reads nothing from the prefix cache. extra: vllm_xargs."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=length,
        temperature=0,
        logprobs=0,
        prompt_logprobs=0 if prompt else None,
        ignore_eos=True,
        extra_args=extra or None,
    )


def written(llm: Any, prompts: Sequence[Sequence[int]], asked: Any) -> list[tuple[list[int], Tensor]]:
    """Of each prompt the tokens that follow, and the log-probability of every token after the first."""
    outputs = llm.generate([{"prompt_token_ids": list(each)} for each in prompts], asked, use_tqdm=False)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        steps = list(output.prompt_logprobs or [])[1:] + list(output.outputs[0].logprobs)
        follow = (list(prompt)[1:] if output.prompt_logprobs else []) + answer
        found.append((answer, torch.tensor([step[token].logprob for step, token in zip(steps, follow, strict=True)])))
    return found


class Reference:
    """transformers' model in a folder, at any k'."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def set(self, k: int | Sequence[int]) -> None:
        """By megatron_emoe's hooks; models that it does not know have no scales, so there k is set in each gate."""
        if self.model.config.model_type in hf_models.MODEL_TYPES:
            set_active_experts(self.model, k)
        else:
            gates = [layer.mlp.gate for layer in self.model.model.layers if hasattr(layer.mlp, "gate")]
            for gate, each in zip(gates, [k] * len(gates) if isinstance(k, int) else k, strict=True):
                gate.top_k = each

    def logprobs(self, row: Sequence[int], k: int | Sequence[int]) -> Tensor:
        """Of every token of `row` after the first."""
        self.set(k)
        with torch.no_grad():
            found = self.model(torch.tensor([list(row)])).logits[0].log_softmax(-1)
        return found[:-1].gather(1, torch.tensor(list(row))[1:, None])[:, 0]

    def in_phases(self, prompt: Sequence[int], answer: Sequence[int], prefill: Any, decode: Any) -> Tensor:
        """The same where the prompt is read at one k' and the answer written at another."""
        self.set(prefill)
        with torch.no_grad():
            out = self.model(torch.tensor([list(prompt)]), use_cache=True)
            logits = [out.logits[0]]
            self.set(decode)
            for token in answer[:-1]:
                out = self.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[0])
        follow = [*prompt[1:], *answer]
        return torch.cat(logits).log_softmax(-1).gather(1, torch.tensor(follow)[:, None])[:, 0]
