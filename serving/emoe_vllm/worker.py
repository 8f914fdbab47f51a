"""A worker that tells the MoE layers each token's budget before every forward pass. Shape suffix: T tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu_worker import Worker

from emoe_vllm import control
from emoe_vllm.levels import PADDING, Levels, Tables
from emoe_vllm.requests import pinned
from emoe_vllm.runner import Batch, ElasticMoERunner, Group
from emoe_vllm.settings import block_of, decided


class ElasticWorker(Worker):
    """On a GPU (not run: none was at hand), and what the worker on a CPU has in common with it. `prefill`, `decode`:
    tokens of requests by level, since the start."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        settings = decided(self.vllm_config.additional_config)
        assert settings is not None, "the plugin chose this worker"
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        most = max(most, self.vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self._levels = Levels(settings)
        # Where the block does not say it, k of training is what config.json said before layers were built for k_max.
        block = replace(block_of(self.model_config.hf_config), k_train=settings.k_train)
        self._tables = Tables(self._levels, block, self.device)
        # Until there are requests, as in the pass that measures memory, all tokens have the largest budget.
        self._host_T = torch.full((most,), settings.k_max, dtype=torch.int32)
        self._batch = Batch(self._host_T.to(self.device), groups=[(settings.k_max, None)])
        self.prefill: Counter[int] = Counter()
        self.decode: Counter[int] = Counter()
        self._attach()
        self._forward = self.model_runner._model_forward
        self.model_runner._model_forward = self._forward_with_levels

    def _attach(self) -> None:
        numbers = self._levels.settings.layers
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            if isinstance(layer, ElasticMoERunner):
                layer.attach(self._batch, self._tables.layers[numbers.index(layer.layer_id)])
        if not self._batch.rows:
            raise ValueError(f"{type(self.model_runner.model).__name__}: none of its layers can change k'")

    def execute_model(self, scheduler_output: Any) -> Any:
        self._scheduled = scheduler_output
        self._tables.learn(getattr(scheduler_output, "emoe_layouts", ()))
        return super().execute_model(scheduler_output)

    def _forward_with_levels(self, *args: Any, **kwargs: Any) -> Any:
        self._fill(self._scheduled)
        return self._forward(*args, **kwargs)

    def _fill(self, scheduled: Any) -> None:
        """Each token's level, in the order of the batch: prefill up to the end of the prompt, decode after it."""
        levels_T, end = self._host_T.numpy(), 0
        following = getattr(scheduled, "emoe_level", None)
        for name in self.model_runner.input_batch.req_ids:
            request, tokens = self.model_runner.requests[name], scheduled.num_scheduled_tokens[name]
            prefill, decode = pinned(request.sampling_params, following)
            prompt = min(max(request.num_prompt_tokens - request.num_computed_tokens, 0), tokens)
            levels_T[end : end + prompt] = prefill
            levels_T[end + prompt : end + tokens] = decode
            self.prefill[prefill] += prompt
            self.decode[decode] += tokens - prompt
            end += tokens
        levels_T[end:] = PADDING
        found = np.unique(levels_T[:end])
        self._batch.groups = [(int(found[0]), None)] if len(found) == 1 else self._groups(found, levels_T[:end])
        if self._batch.levels_T.device.type != "cpu":
            # Not run: no GPU was at hand. In stream order, so after the step that may still read it; from a page of its
            # own, as the next step is prepared, and _host_T filled, while this copy may still wait.
            self._batch.levels_T.copy_(self._host_T.pin_memory(), non_blocking=True)

    @staticmethod
    def _groups(found: Any, levels_T: Any) -> list[Group]:
        return [(int(level), torch.from_numpy(np.flatnonzero(levels_T == level))) for level in found]

    def emoe_status(self) -> dict[str, Any]:
        """By `collective_rpc`: tokens that ran at each budget, all and by phase, and rows that reached the experts of each
        layer."""
        counts = {"tokens": self.prefill + self.decode, "prefill": self.prefill, "decode": self.decode}
        return {phase: self._by_budget(tokens) for phase, tokens in counts.items()} | {
            "rows": {str(layer): rows for layer, rows in self._batch.rows.items()}
        }

    def _by_budget(self, tokens: Counter[int]) -> list[list[Any]]:
        return [[self._levels.budget(level), count] for level, count in sorted(tokens.items()) if count]

    def emoe_set_k(self, k: Any) -> dict[str, Any]:
        """By `collective_rpc`, where worker and scheduler are one process (see control.py for every other)."""
        return control.in_this_process(self.vllm_config).emoe_change({"k": k})
