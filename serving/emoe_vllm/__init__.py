"""One elastic mixture-of-experts checkpoint in vLLM, at every number k' of active experts per token.

vLLM finds `plugin.register` by its entry point. From there on: `plugin.py` decides, when a model's configuration is
complete, whether it is served elastically; `settings.py` is what was decided, `refusals.py` what cannot be, `block.py`
what the checkpoint says, `budgets.py` which budgets have names, `layers.py` which layers have experts. `levels.py`
numbers the budgets that tokens carry; `routing.py` is the router as one pure function; `runner.py` puts it into vLLM's
MoE layers, `on_cpu.py` is what runs there on a CPU, `surplus.py` saves work on a GPU; `worker.py` tells the layers each
token's budget. `scheduler.py` gives every request its budget, `requests.py` reads what a request asks for;
`following.py` lets decoding follow the load, by the rule in `policy.py`. `control.py` and `endpoint.py` change k' while
the engine runs, `metrics.py` says in Prometheus' format what ran. `bench.py` is a program apart: load on a server.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["__version__", "set_k", "set_k_async", "status", "status_async"]

if TYPE_CHECKING:
    from emoe_vllm.control import set_k, set_k_async, status, status_async
else:

    def __getattr__(name: str) -> Any:
        """The public `name` at its first use, so that reading settings needs no vLLM."""
        if name in __all__:
            from emoe_vllm import control

            return getattr(control, name)
        raise AttributeError(f"module 'emoe_vllm' has no attribute {name!r}")
