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
from emoe_vllm.on_cpu import Batch, Group
from emoe_vllm.requests import pinned
from emoe_vllm.runner import ElasticMoERunner
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
        self._writing: tuple[list[str], int | None] | None = None
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
        """Each token's level, in the order of the batch: prefill up to the end of the prompt, decode after it. Where
        the requests of the step before write one token each again, everything is as it was."""
        batch, following = self.model_runner.input_batch, getattr(scheduled, "emoe_level", None)
        names, requests = batch.req_ids, len(batch.req_ids)
        unread_R = batch.num_prompt_tokens[:requests] - batch.num_computed_tokens_cpu[:requests]  # NumPy, on the host
        writing = scheduled.total_num_scheduled_tokens == requests and not (unread_R > 0).any()
        if not writing or (names, following) != self._writing:
            tokens_R = np.array([scheduled.num_scheduled_tokens[name] for name in names])
            prompt_R = unread_R.clip(0, tokens_R)
            known = self.model_runner.requests
            levels_R2 = np.array([pinned(known[name].sampling_params, following) for name in names])
            counts_R2 = np.stack([prompt_R, tokens_R - prompt_R], axis=1)
            self._set(levels_R2.ravel().repeat(counts_R2.ravel()))
            self._counts = [_by_level(levels_R2[:, phase], counts_R2[:, phase]) for phase in (0, 1)]
            self._writing = (list(names), following) if writing else None
        self.prefill.update(self._counts[0])
        self.decode.update(self._counts[1])

    def _set(self, levels: Any) -> None:
        levels_T = self._host_T.numpy()
        levels_T[: len(levels)], levels_T[len(levels) :] = levels, PADDING
        found = np.unique(levels)
        self._batch.groups = [(int(found[0]), None)] if len(found) == 1 else self._groups(found, levels)
        if self._batch.levels_T.device.type != "cpu":
            # Not run: no GPU was at hand. In stream order, so after the step that may still read it; from a page of its
            # own, as the next step is prepared, and _host_T filled, while this copy may still wait.
            self._batch.levels_T.copy_(self._host_T.pin_memory(), non_blocking=True)

    @staticmethod
    def _groups(found: Any, levels_T: Any) -> list[Group]:
        return [(int(level), torch.from_numpy(np.flatnonzero(levels_T == level))) for level in found]

    def emoe_status(self) -> dict[str, Any]:
        """By `collective_rpc`: tokens that ran at each budget, all and by phase, and rows that reached the experts of
        each layer."""
        counts = {"tokens": self.prefill + self.decode, "prefill": self.prefill, "decode": self.decode}
        return {phase: self._by_budget(tokens) for phase, tokens in counts.items()} | {
            "rows": {str(layer): rows for layer, rows in self._batch.rows.items()}
        }

    def _by_budget(self, tokens: Counter[int]) -> list[list[Any]]:
        return [[self._levels.budget(level), count] for level, count in sorted(tokens.items()) if count]

    def emoe_set_k(self, k: Any) -> dict[str, Any]:
        """By `collective_rpc`, where worker and scheduler are one process (see control.py for every other)."""
        return control.in_this_process(self.vllm_config).emoe_change({"k": k})


def _by_level(levels_R: Any, counts_R: Any) -> Counter[int]:
    """Tokens of each level, where requests have these levels and so many tokens."""
    found: Counter[int] = Counter()
    for level, count in zip(levels_R.tolist(), counts_R.tolist(), strict=True):
        found[level] += count
    return found
