"""k' of a running server by HTTP: `GET /emoe` and `POST /emoe/k {"k": 8}`.

vLLM attaches routes of plugins only where VLLM_PLUGINS names them, here `VLLM_PLUGINS=emoe`. As with vLLM's own routes
outside /v1, no API key is asked for: whoever reaches the port may change k'.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from emoe_vllm import control
from emoe_vllm.settings import check_budget, decided

ROUTER = APIRouter()


class ElasticEndpoint:
    """The entry point of `vllm.endpoint_plugins`."""

    name = "emoe"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(ROUTER)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.emoe_settings = None if engine_client is None else decided(engine_client.vllm_config.additional_config)


@ROUTER.get("/emoe")
async def get_status(request: Request) -> JSONResponse:
    """What applies now, and what ran."""
    if request.app.state.emoe_settings is None:
        return _not_elastic()
    return JSONResponse(await control.status_async(request.app.state.engine_client))


@ROUTER.post("/emoe/k")
async def post_k(request: Request) -> JSONResponse:
    """From now on requests that name no k' get the one in the body."""
    settings = request.app.state.emoe_settings
    if settings is None:
        return _not_elastic()
    try:
        body = await request.json()
        if not isinstance(body, dict) or set(body) != {"k"}:
            raise ValueError('the body must be an object with the key k alone, such as {"k": 8}')
        k = check_budget(body["k"], settings.k_min, settings.k_max, len(settings.layers), "k")
    except ValueError as error:
        return _error(400, str(error))
    return JSONResponse(await control.set_k_async(request.app.state.engine_client, k))


def _not_elastic() -> JSONResponse:
    return _error(404, 'this model is not served elastically: it has no block "emoe", or --additional-config says so')


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)
