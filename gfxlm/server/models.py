"""What there is: models, health, version."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from gfxlm import __version__
from gfxlm.server.registry import Models

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models that can be asked for, in memory or not."""
    models: Models = request.app.state.models
    return {"object": "list", "data": [_described(models, name) for name in models.specs]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """One of them."""
    models: Models = request.app.state.models
    return _described(models, models.resolve(model))


@router.head("/health", include_in_schema=False)
@router.head("/v1/health", include_in_schema=False)
@router.get("/health")
@router.get("/v1/health")
async def health(request: Request) -> JSONResponse:
    """200 where requests can be answered, 503 while the first model is loading, and after an engine has failed."""
    status = request.app.state.models.health
    return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    """The server's version."""
    return {"version": __version__}


def _described(models: Models, name: str) -> dict[str, Any]:
    worker = models.loaded.get(name)
    described = {
        "id": name,
        "object": "model",
        "created": models.created,
        "owned_by": "gfxlm",
        "loaded": worker is not None,
    }
    return described | ({} if worker is None else {"max_model_len": worker.max_context})
