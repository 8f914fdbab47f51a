"""A GPU machine without Transformer Engine: Megatron-Core's own ("local") layers, said in one line.

Megatron's defaults ask for Transformer Engine, and what lacks it ends a run when its model is built, or before without
a flag's name. docs/gpu.md says what is missing then.
"""

from __future__ import annotations

from importlib.util import find_spec

from megatron_emoe.host import flags as host_flags
from megatron_emoe.settings.command_line import say

_NEEDED = "needs Transformer Engine, which is not installed (docs/gpu.md)"
_ONLY_THERE = {
    *host_flags.IMPOSSIBLE["Transformer Engine computes on GPUs only"].split(),
    *("--moe-permute-fusion", "--tp-comm-overlap"),
}


def is_there() -> bool:
    """Whether Transformer Engine is installed, without importing it."""
    return find_spec("transformer_engine") is not None


def settle(argv: list[str]) -> list[str]:
    """`argv` as a GPU machine can run it: without Transformer Engine, with the flags of local layers, which is said.

    Raises:
        ValueError: a flag that only Transformer Engine can serve.
    """
    if is_there():
        return argv
    _refuse(argv)
    given = dict(host_flags.given_flags(argv))
    local = {name: value for name, value in host_flags.LOCAL_LAYERS.items() if name not in given}
    left_out = [word for word in argv if word in host_flags.LEFT_OUT]
    without = f"; {', '.join(left_out)} is left out" if left_out else ""
    say(f"Transformer Engine is not installed: Megatron-Core's local layers are used{without} (docs/gpu.md)")
    return [word for word in argv if word not in left_out] + host_flags.words_of(local)


def _refuse(argv: list[str]) -> None:
    for name, value in host_flags.given_flags(argv):
        if name in _ONLY_THERE or (name, value) == ("--transformer-impl", "transformer_engine"):
            raise ValueError(f"{f'{name} {value}'.strip()}: {_NEEDED}")
        if name == "--context-parallel-size" and value not in ("", "1"):
            raise ValueError(f"{name} {value}: {_NEEDED}")
