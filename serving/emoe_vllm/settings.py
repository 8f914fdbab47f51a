"""What was decided for one server: from the block in config.json and `--additional-config '{"emoe": ...}'`. Pure.

The decision is made once, where vLLM's configuration is complete, and travels to every process as numbers in
`additional_config["emoe"]`, which vLLM counts in the hash of compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from emoe_vllm.block import Block, read_block
from emoe_vllm.budgets import FILE, Budget, Ks, Model, read_budgets
from emoe_vllm.layers import experts_of, k_key, moe_layers, reachable_experts
from emoe_vllm.policy import LoadTable, read_load_table

FLAG = "--additional-config emoe"
ASKED = ("k", "k_min", "k_max", "budgets", "follow", "hold", "margin", "min_quality")
"""What a person may set. Everything else in the block of additional_config is what this module decided."""
MOST_LAYOUTS = 64
"""Budgets with a k' per layer that one server knows at a time, beside those that have a name."""


@dataclass(frozen=True)
class ElasticSettings:
    """k_train: k of training. k_min, k_max: the k' that are admitted; layers run with k_max, masked down. k: the k' of
    a request that names none, one number or one for each layer. layers: numbers of the decoder layers with experts.
    budgets: those with a name. follow: the k' of decoding by load, None: it follows nothing."""

    k_train: int
    k_min: int
    k_max: int
    k: Ks
    layers: tuple[int, ...]
    experts: int
    budgets: tuple[Budget, ...] = ()
    follow: LoadTable | None = None

    def as_json(self) -> dict[str, Any]:
        """For additional_config."""
        return asdict(self) | {"decided": True}

    def budget(self, found: Any, where: str) -> Ks:
        """A k' for all layers, one for each, or a name's (ValueError: neither, or out of range)."""
        if isinstance(found, str) and self.budgets:
            return self.named(found, where)
        return check_budget(found, self.k_min, self.k_max, len(self.layers), where)

    def named(self, found: Any, where: str) -> Ks:
        """The same without lists, which requests do not take."""
        if not isinstance(found, str) or not self.budgets:
            return check_k(found, self.k_min, self.k_max, where)
        for budget in self.budgets:
            if budget.name == found:
                return budget.k
        names = ", ".join(budget.name for budget in self.budgets)
        whole = f"a whole number in [{self.k_min}, {self.k_max}]"
        raise ValueError(f"{where} {found!r}: must be one of {names}, or {whole}, the k' that are served")

    def budget_at(self, k: Ks) -> Budget | None:
        """The first budget of that k', if one has it."""
        return next(iter(self._at(k)), None)

    def quality(self, k: Ks) -> float | None:
        """Of a k', as the budgets say it; at the k of training it is 1 by definition."""
        known = [budget.quality for budget in self._at(k) if budget.quality is not None]
        return known[0] if known else 1.0 if set(as_layout(k, 1)) == {self.k_train} else None

    def _at(self, k: Ks) -> list[Budget]:
        layers = len(self.layers)
        return [budget for budget in self.budgets if as_layout(budget.k, layers) == as_layout(k, layers)]


def decided(additional_config: Any) -> ElasticSettings | None:
    """The settings of a configuration that `decide` has passed, None where nothing is elastic."""
    found = additional_config.get("emoe") if isinstance(additional_config, Mapping) else None
    if not isinstance(found, Mapping) or not found.get("decided"):
        return None
    values: dict[str, Any] = {key: _fixed(value) for key, value in found.items() if key != "decided"}
    values["budgets"] = tuple(Budget(**budget) for budget in values["budgets"])
    values["follow"] = None if values["follow"] is None else LoadTable(**values["follow"])
    return ElasticSettings(**values)


def _fixed(value: Any) -> Any:
    """What was a tuple before it was JSON is one again."""
    if isinstance(value, Mapping):
        return {key: _fixed(each) for key, each in value.items()}
    return tuple(map(_fixed, value)) if isinstance(value, list | tuple) else value


def asked_for(config: Any, additional_config: Any) -> bool:
    """Whether a model is served elastically: it has the block, or the flag says so. `"emoe": false` is a no."""
    if not isinstance(additional_config, Mapping):
        return getattr(config, "emoe", None) is not None
    asked = additional_config.get("emoe")
    if asked is None:
        return getattr(config, "emoe", None) is not None
    if isinstance(asked, bool | Mapping):
        return asked is not False
    raise ValueError(f"{FLAG} {asked!r}: must be an object with {', '.join(ASKED)}, or false for vLLM as it is")


def block_of(config: Any) -> Block:
    """What the checkpoint says; of a model that was not exported by megatron_emoe, its k alone."""
    k = getattr(config, k_key(config))
    return read_block(getattr(config, "emoe", None) or {}, len(moe_layers(config)), experts_of(config), k)


def decide(config: Any, additional_config: Mapping[str, Any], folder: str | None = None) -> ElasticSettings:
    """The settings of a server, before anything is built. folder: of the model, where a table of budgets may lie.

    Raises:
        ValueError: flag, path or key, value and rule.
    """
    asked = additional_config.get("emoe")
    asked = asked if isinstance(asked, Mapping) else {}
    for key in asked:
        if key not in ASKED:
            raise ValueError(f"{FLAG}.{key}: is not known; known: {', '.join(ASKED)}")
    block, layers, most = block_of(config), moe_layers(config), reachable_experts(config)
    model = Model(block.k_train, experts_of(config), len(layers), most)
    budgets = _budgets(asked.get("budgets"), folder, model)
    default = block.k_per_layer or getattr(config, k_key(config))
    listed = [k for budget in budgets for k in as_layout(budget.k, len(layers))]
    smallest, largest = block.k_range or (1, min(2 * block.k_train, most))
    wanted = max(largest, *as_layout(default, len(layers)), *_numbers(asked.get("k")), *listed)
    k_max = _whole(asked, "k_max", min(wanted, most), 1, most)
    k_min = _whole(asked, "k_min", min(smallest, *listed, k_max), 1, k_max)
    # What a range of one's own excludes has no name.
    served = tuple(each for each in budgets if all(k_min <= k <= k_max for k in as_layout(each.k, len(layers))))
    settings = ElasticSettings(block.k_train, k_min, k_max, k_min, layers, experts_of(config), served)
    settings = replace(settings, k=settings.budget(asked.get("k", default), f"{FLAG}.k"))
    return replace(settings, follow=read_load_table(asked, FLAG, settings.budget, settings.quality))


def _budgets(asked: Any, folder: str | None, model: Model) -> tuple[Budget, ...]:
    """Those that the flag names, else those beside config.json. `"budgets": false`: none."""
    if asked is None:
        path = None if folder is None else Path(folder) / FILE
        return read_budgets(str(path), FILE, model) if path is not None and path.exists() else ()
    if asked is False:
        return ()
    if not isinstance(asked, str | Mapping):
        raise ValueError(f"{FLAG}.budgets {asked!r}: must be the path of a table, the table itself, or false")
    return read_budgets(asked, f"{FLAG}.budgets", model)


def check_budget(found: Any, k_min: int, k_max: int, layers: int, where: str) -> Ks:
    """A k' for all layers or one for each (ValueError: neither, or out of range)."""
    if isinstance(found, Sequence) and not isinstance(found, str):
        if len(found) != layers:
            raise ValueError(f"{where} {list(found)}: must have one k' for each of the {layers} layers with experts")
        return tuple(check_k(each, k_min, k_max, where) for each in found)
    return check_k(found, k_min, k_max, where)


def check_k(found: Any, k_min: int, k_max: int, where: str) -> int:
    """A k' within the range that is served."""
    if type(found) is not int or not k_min <= found <= k_max:
        raise ValueError(f"{where} {found!r}: must be a whole number in [{k_min}, {k_max}], the k' that are served")
    return found


def as_layout(k: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """A k' for every layer."""
    return (k,) * layers if isinstance(k, int) else tuple(k)


def _numbers(k: Any) -> list[int]:
    found = k if isinstance(k, list | tuple) else [k]
    return [each for each in found if type(each) is int]


def _whole(asked: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = asked.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{FLAG}.{key} {value!r}: must be a whole number in [{low}, {high}]")
    return value
