"""HTTP: routes, the key, the size of bodies, errors of one shape, and clients that leave."""

import asyncio
import contextlib
import hmac
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from qcompile.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse
from qcompile.serving.service import Answer, Service, poster

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = {"/health"}  # for load balancers, which have no key


def build(service: Service, *, key: str | None = None) -> FastAPI:
    """The application. key: what clients must send as a bearer token. Its lifespan ends the serving loop."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.loop.post = poster(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(service.loop.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, service=service, key=key)
    app.add_exception_handler(HTTPException, _plain_error)
    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "qcompile"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        scheduler = service.loop.scheduler
        return PlainTextResponse(service.metrics.text(running=scheduler.running, waiting=scheduler.waiting))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{**card, "max_model_len": service.length}]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, "there is no such model here; see /v1/models", code="model_not_found")
        return card

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)

    return app


async def _answer(service: Service, request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
    parsed = parse(kind, await _body(request, most=2**20 + 64 * service.length))
    answer = await service.start(parsed)
    watcher = asyncio.create_task(_cancel_when_gone(request, answer))
    try:
        if not parsed.stream:
            return JSONResponse(await answer.whole())
        stream = answer.stream()
        first = await anext(stream)
    except BaseException:
        answer.cancel()
        raise
    finally:
        if not parsed.stream:
            watcher.cancel()
    return StreamingResponse(_streamed(answer, first, stream, watcher), media_type="text/event-stream")


async def _streamed(
    answer: Answer, first: bytes, rest: AsyncIterator[bytes], watcher: asyncio.Task[None]
) -> AsyncIterator[bytes]:
    try:
        yield first
        async for chunk in rest:
            yield chunk
    finally:
        watcher.cancel()
        answer.cancel()  # of what is left, if the client left


async def _cancel_when_gone(request: Request, answer: Answer) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


async def _body(request: Request, most: int) -> bytes:
    """Raises ApiError 413."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"the body must have at most {most} bytes")
        parts.append(part)
    return b"".join(parts)


async def _plain_error(request: Request, error: Exception) -> JSONResponse:
    """What the router itself refuses: unknown paths and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: "there is no such path", 405: "this path takes another method"}
    return JSONResponse(ApiError(status, words.get(status, "the request is malformed")).body, status)


class Guard:
    """Around everything: asks for the key, turns every exception into an answer, counts."""

    def __init__(self, app: Any, service: Service, key: str | None) -> None:
        self._app, self._metrics = app, service.metrics
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, receive, watched)
        except ApiError as error:
            await self._refuse(error, status, scope, receive, watched)
        except Exception as error:  # a bug: the client gets no details, the log no message, which may quote the client
            print(f"qcompile: internal error {type(error).__name__}", file=sys.stderr, flush=True)
            await self._refuse(ApiError(500, "internal error"), status, scope, receive, watched)
        route = scope.get("route")
        self._metrics.add("qcompile_requests_total", path=getattr(route, "path", "other"), status=str(status))

    async def _refuse(self, error: ApiError, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        if status:  # under way already
            return
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        if error.retry is not None:
            headers["Retry-After"] = str(error.retry)
        await JSONResponse(error.body, error.status, headers)(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, self._key):
            raise ApiError(401, "a valid API key must be sent as a bearer token", code="invalid_api_key")
