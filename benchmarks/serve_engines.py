"""One random model in several vLLM engines of one process, driven step by step: with the plugin, and stock at each k'.

Import this module before vLLM: it asks for an engine core in this process, so that steps of two engines can take turns.
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """An OLMoE. `width` is that of one expert; `k` that of training, from which follow the k' that are measured."""

    hidden: int = 512
    width: int = 512
    experts: int = 32
    layers: int = 4
    k: int = 4
    vocabulary: int = 4096

    @property
    def ks(self) -> tuple[int, ...]:
        return self.k // 2, self.k, 2 * self.k, 3 * self.k

    @property
    def expert_megabytes(self) -> float:
        """Weights of all experts, in fp32."""
        return 12 * self.hidden * self.width * self.experts * self.layers / 1e6


QUICK = Shape(hidden=128, width=64, experts=16, layers=2, vocabulary=512)
LENGTH = 1024
"""Tokens that a request can have."""
STARTS = (0, 10, 18)
"""Requests from which on decoding that follows the load has 3k, 2k and k. A request that names a k' keeps it."""


def save(folder: Path, shape: Shape) -> None:
    """A random model with what an export has: a block "emoe" with a tail scale, so that the plugin's router has all of
    its work to do above k."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        num_experts=shape.experts,
        num_experts_per_tok=shape.k,
        max_position_embeddings=LENGTH,
        eos_token_id=1,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    path, most = folder / "config.json", 3 * shape.k
    block = {"k_train": shape.k, "k_range": [1, most], "tail_scale": [f"{shape.k + 1}:0.6", f"{most}:0.2"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"emoe": block}, indent=2))


class Engine:
    """A vLLM engine with default settings but for its size. `emoe`: as in --additional-config, False for stock vLLM;
    `k`: the k' of a stock one."""

    def __init__(self, folder: Path, emoe: Any, k: int | None = None, eager: bool = False, **options: Any) -> None:
        from vllm import LLM

        overrides = {} if k is None else {"hf_overrides": {"num_experts_per_tok": k}}
        self.llm = LLM(
            str(folder),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=eager,
            enable_prefix_caching=False,  # every prompt is computed
            max_model_len=LENGTH,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=1 << 28,
            additional_config={"emoe": emoe},
            **overrides,
            **options,
        )
        self.engine = self.llm.llm_engine
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self._numbers = itertools.count()

    def use_weights_of(self, other: "Engine") -> None:
        """The same memory: where it lies changes a step by some percent, more than what is to be measured."""
        (ours,), (theirs,) = (
            each.llm.apply_model(lambda model: dict(model.named_parameters())) for each in (self, other)
        )
        for name, tensor in ours.items():
            tensor.data = theirs[name].data

    def add(self, prompt: int, length: int, k: int | None = None) -> str:
        """A request with `prompt` random tokens that writes `length`, at k' where the engine is elastic."""
        from vllm import SamplingParams

        number = next(self._numbers)
        draw = random.Random(number)  # the same requests on every engine
        tokens = [draw.randrange(2, self.vocabulary) for _ in range(prompt)]
        extra = None if k is None else {"emoe_k": k}
        asked = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
        self.engine.add_request(str(number), {"prompt_token_ids": tokens}, asked)
        return str(number)

    def step(self, *_: Any) -> Any:
        return self.engine.step()

    def drain(self) -> None:
        """Run what is there to its end."""
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def start(self, batch: int, length: int, ks: Sequence[int | None], prompt: int = 16) -> None:
        """A batch whose prompts are read; the k' of `ks` take turns among its requests."""
        self.drain()
        for number in range(batch):
            self.add(prompt, length, ks[number % len(ks)])
        self.engine.step()

    def prefill(self, batch: int, prompt: int, ks: Sequence[int | None]) -> None:
        """Read `batch` prompts in one step."""
        for number in range(batch):
            self.add(prompt, 1, ks[number % len(ks)])
        self.drain()


@dataclass
class Engines:
    """The elastic engine, built for the largest k', and a stock one at each of `shape.ks`."""

    shape: Shape
    elastic: Engine
    stock: dict[int, Engine]

    @classmethod
    def of(cls, folder: Path, shape: Shape, eager: bool) -> "Engines":
        save(folder, shape)
        print(f"model: {json.dumps(asdict(shape))}, experts {shape.expert_megabytes:.0f} MB", file=sys.stderr)
        largest = {str(start): k for start, k in zip(STARTS, shape.ks[:0:-1], strict=True)}
        elastic = Engine(folder, {"follow": largest, "hold": 8}, eager=eager)
        stock = {k: Engine(folder, False, k, eager=eager) for k in shape.ks}
        for engine in stock.values():
            engine.use_weights_of(elastic)
        return cls(shape, elastic, stock)
