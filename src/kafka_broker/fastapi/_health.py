"""Probes: is this process alive, and should it be given work?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from kafka_broker._manager import BrokerManager

health_router: APIRouter = APIRouter(tags=["health"])
"""``GET /livez`` and ``GET /readyz`` for all brokers of the application.

200 when each of them is, else 503; the body says why. Liveness is false only when a new process
helps: a Kafka that is away does not make it false, but it makes readiness false.
"""

_ANSWERS: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; the body says why"}}


@health_router.get("/livez", summary="Is it alive?", responses=_ANSWERS)
async def livez(request: Request) -> JSONResponse:
    """Tell whether only a new process would help."""
    return _answer(request, "live")


@health_router.get("/readyz", summary="Should it be given work?", responses=_ANSWERS)
async def readyz(request: Request) -> JSONResponse:
    """Tell whether it can ask and be asked now."""
    return _answer(request, "ready")


def _answer(request: Request, what: Literal["live", "ready"]) -> JSONResponse:
    state = request.scope.get("state", {}).values()
    brokers = dict.fromkeys(one for one in state if isinstance(one, BrokerManager))
    bodies = [asdict(broker.health()) for broker in brokers]
    for body in bodies:
        for check in body["checks"].values():
            check["age"] = round(check["age"], 3)
    well = bool(bodies) and all(body[what] for body in bodies)
    return JSONResponse(
        {
            "status": "ok" if well else "unavailable",
            "brokers": bodies,
            **({} if bodies else {"detail": "no broker runs with this application"}),
        },
        status_code=200 if well else 503,
        headers={"cache-control": "no-store"},
    )
