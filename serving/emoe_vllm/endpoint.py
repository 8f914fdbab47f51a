"""k' of a running server by HTTP: `GET /emoe`, `POST /emoe/k {"k": 8}`, and more in `GET /metrics`.

vLLM attaches routes of plugins only where VLLM_PLUGINS names them, here `VLLM_PLUGINS=emoe`. As with vLLM's own routes
outside /v1, no API key is asked for: whoever reaches the port may change k'.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from vllm.logger import init_logger

from emoe_vllm import control, metrics
from emoe_vllm.settings import ElasticSettings, decided

logger = init_logger(__name__)
ROUTER = APIRouter()
PATIENCE = 5.0
"""Seconds that a scrape waits for the engine, which answers between two steps; less than a scraper's own patience."""


class ElasticEndpoint:
    """The entry point of `vllm.endpoint_plugins`."""

    name = "emoe"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(ROUTER)
        app.add_api_route("/metrics", get_metrics, methods=["GET"], include_in_schema=False)

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
        change = checked(await request.json(), settings)
    except ValueError as error:
        return _error(400, str(error))
    return JSONResponse(await control.change_async(request.app.state.engine_client, change))


async def get_metrics(request: Request) -> Response:
    """vLLM's metrics, and ours: vLLM lets a plugin's route replace its own of the same path."""
    state, status = request.app.state, None
    if state.emoe_settings is not None:
        asked = asyncio.ensure_future(control.status_async(state.engine_client))
        await asyncio.wait({asked}, timeout=PATIENCE)
        if asked.done() and asked.exception() is None:
            status = asked.result()
        else:
            asked.cancel()
            logger.warning("GET /metrics: no answer of the engine; the metrics of elastic experts are left out")
    name = state.vllm_config.model_config.served_model_name
    return Response(metrics.text(status, name), headers={"Content-Type": metrics.CONTENT_TYPE_LATEST})


def checked(body: Any, settings: ElasticSettings) -> dict[str, Any]:
    """The body of a change, names as their k' (ValueError: key, value and rule)."""
    if not isinstance(body, dict) or not body or not set(body) <= {"k", "follow"}:
        raise ValueError('the body must be an object with the key k, such as {"k": 8}, or follow, or both')
    if "follow" in body and type(body["follow"]) is not bool:
        raise ValueError(f"follow {body['follow']!r}: must be true or false")
    if body.get("follow") and settings.follow is None:
        raise ValueError("follow True: this server has no levels to follow; --additional-config emoe.follow sets them")
    if body.get("k") is None:
        return body
    return body | {"k": settings.budget(body["k"], "k")}


def _not_elastic() -> JSONResponse:
    return _error(404, 'this model is not served elastically: it has no block "emoe", or --additional-config says so')


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)
