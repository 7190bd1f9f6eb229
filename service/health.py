"""Whether the service lives, and whether work can be sent to it."""

from pathlib import PurePath
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from llm.engine import Engine, EngineHealth, EngineState
from service.entry.admission import Admission


def health_router(engine: Engine, admission: Admission) -> APIRouter:
    """`/health` and `/ready`."""
    router = APIRouter(tags=["health"])

    @router.get("/health")
    async def health() -> JSONResponse:
        """200 while the service lives, loading included; 503 when the engine is dead."""
        now = engine.health()
        return JSONResponse(_report(now), 503 if now.state is EngineState.DEAD else 200)

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """200 when work can be sent here, else 503: while the model loads, and when the service is to stop."""
        now = engine.health()
        is_ready = now.state in (EngineState.READY, EngineState.DEGRADED) and not admission.is_draining
        report = _report(now)
        if admission.is_draining:
            report["status"] = "stopping"
        return JSONResponse(report, 200 if is_ready else 503)

    return router


def _report(health: EngineHealth) -> dict[str, Any]:
    report: dict[str, Any] = {
        "status": "error" if health.state is EngineState.DEAD else "ok",
        "model": PurePath(health.model).name if health.model.startswith((".", "/", "~")) else health.model,
        "engine": {
            "state": health.state,
            "running": health.running,
            "waiting": health.waiting,
            "slots": health.slots,
            "context": health.context,
        },
    }
    if health.error is not None:
        report["engine"]["error"] = health.error
    return report
