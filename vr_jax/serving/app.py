"""The routes of the server: OpenAI's, and what an object-level video model has besides."""

import asyncio
import functools
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, HTTPException
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from data_pipes.errors import InputError
from vr_jax.inference.tickets import Cancelled, Done, Event, Failed, Text, Ticket
from vr_jax.serving import answers
from vr_jax.serving.body import Node, parse
from vr_jax.serving.chat import Chat, read_chat
from vr_jax.serving.clips import PICTURE_FORMATS
from vr_jax.serving.engine import Caller, Engine, refusal
from vr_jax.serving.errors import ApiError
from vr_jax.serving.media import Medium

KEEP_ALIVE_SECONDS = 15.0  # of silence, after which a stream says that it lives
THREADS = 8  # that read bodies' media, write frames and proxies
WIDEST = 8192  # pixels of a frame's picture
NAME = 255  # characters of a file's name
IMMUTABLE = "private, max-age=31536000, immutable"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>VideoRefer</title>
<h1>VideoRefer in JAX</h1>
<p>An OpenAI-compatible server: POST <code>/v1/chat/completions</code>.
<p><a href="/v1/models">Models</a> · <a href="/health/ready">Ready?</a> ·
<a href="/metrics">Metrics</a> · <a href="/openapi.json">OpenAPI</a></html>
"""
log = logging.getLogger("vr.serve")


class Gone(Exception):
  """The client has left."""


def make_app(engine: Engine) -> FastAPI:
  """The routes of an engine, without the guard that stands before them."""
  app = FastAPI(title="VideoRefer in JAX", version=version("vr-jax"), docs_url=None, redoc_url=None)
  threads = ThreadPoolExecutor(THREADS, "vr-media")

  async def blocking(function: Callable, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

  @app.exception_handler(ApiError)
  async def refused(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.to_dict(), error.status, error.headers)

  @app.exception_handler(StarletteHTTPException)
  async def unknown(_: Request, error: HTTPException) -> Response:
    code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code)
    refusal = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(refusal.to_dict(), error.status_code, error.headers)

  @app.exception_handler(Exception)
  async def fault(request: Request, _: Exception) -> Response:
    refusal = ApiError(500, f"a fault of the server; request {request.state.request_id}")
    return JSONResponse(refusal.to_dict(), 500)

  # --- Questions

  @app.post("/v1/chat/completions", openapi_extra=_json_body("A chat request; docs/serving.md"))
  async def chat_completions(request: Request) -> Response:
    chat = read_chat(parse(await _text(request)))
    caller = Caller(request.state.owner, request.state.client, request.state.weight)
    ask = functools.partial(engine.ask, chat, caller, engine.listening.request_timeout)
    ticket, medium = ask() if chat.media is None else await blocking(ask)
    return _Answering(engine, ticket, chat, medium, engine.completion())

  # --- Models

  @app.get("/v1/models")
  async def models() -> Any:
    return {"object": "list", "data": [engine.describe()]}

  @app.get("/v1/models/{name:path}")
  async def model(name: str) -> Any:
    engine.check_name(Node(name, "model"))
    return engine.describe()

  # --- Files and media

  @app.post("/v1/files", openapi_extra=_FILE_BODY)
  async def upload(request: Request) -> Any:
    engine.check_open()
    async with request.form(max_files=1, max_fields=8, max_part_size=1 << 16) as form:
      file, purpose = form.get("file"), form.get("purpose")
      if not isinstance(file, UploadFile):
        raise ApiError(400, "no file; accepted: multipart/form-data with file", param="file")
      if purpose is not None and not (isinstance(purpose, str) and len(purpose) <= 64):
        raise ApiError(400, "purpose: accepted: up to 64 characters", param="purpose")
      name = re.split(r"[/\\]", file.filename or "")[-1][:NAME] or "file"
      medium = await blocking(
        engine.store.add, file.file, name, purpose or "user_data", request.state.owner
      )
    return medium.to_dict()

  @app.get("/v1/files")
  async def files(request: Request) -> Any:
    entries = [medium.to_dict() for medium in engine.store.files(request.state.owner)]
    ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"]} if entries else {}
    return {"object": "list", "data": entries, "has_more": False, **ends}

  @app.get("/v1/files/{file_id}")
  async def file(request: Request, file_id: str) -> Any:
    return engine.store.get(file_id, request.state.owner).to_dict()

  @app.delete("/v1/files/{file_id}")
  async def delete(request: Request, file_id: str) -> Any:
    await blocking(engine.store.remove, file_id, request.state.owner)
    return {"id": file_id, "object": "file", "deleted": True}

  @app.get("/v1/vr/media/{file_id}")
  async def media(request: Request, file_id: str, times: str = "0") -> Any:
    medium = engine.store.get(file_id, request.state.owner)
    return _described(medium, with_times=times in ("1", "true"))

  @app.get("/v1/vr/media/{file_id}/frames/{n}")
  async def frame(
    request: Request, file_id: str, n: str, width: str | None = None, format: str = "jpeg"
  ) -> Response:
    medium = engine.store.get(file_id, request.state.owner)
    number = Node(int(n) if n.isdecimal() and len(n) < 10 else n, "n").whole(0, 1 << 31)
    wide = None
    if width is not None:
      digits = width.isdecimal() and len(width) < 10
      wide = Node(int(width) if digits else width, "width").whole(1, WIDEST)
    form = Node(format, "format").choice(PICTURE_FORMATS)
    tag = f'"{medium.id}-{number}-{wide or 0}-{form}"'
    headers = {"etag": tag, "cache-control": IMMUTABLE}
    if tag in request.headers.get("if-none-match", ""):
      return Response(status_code=304, headers=headers)
    content = await blocking(engine.store.frame, medium, number, wide, form)
    return Response(content, media_type=f"image/{form}", headers=headers)

  @app.head("/v1/vr/media/{file_id}/play", include_in_schema=False)
  @app.get("/v1/vr/media/{file_id}/play")
  async def play(request: Request, file_id: str) -> Response:
    medium = engine.store.get(file_id, request.state.owner)
    path, kind = await blocking(engine.store.playable, medium)
    return FileResponse(path, media_type=kind, headers={"cache-control": "private"})

  # --- Operation

  @app.get("/health")
  async def health() -> Any:
    return {"status": "ok"}

  @app.get("/health/ready")
  async def ready() -> Any:
    engine.check_open()
    return {"status": "ready"}

  @app.get("/version")
  async def versions() -> Any:
    return {"version": version("vr-jax")}

  @app.get("/metrics")
  async def metrics() -> Response:
    return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

  @app.get("/")
  async def page() -> Response:
    return HTMLResponse(PAGE)

  return app


class _Answering(Response):
  """The answer of a ticket: whole, or as a stream; a client that leaves cancels it."""

  def __init__(
    self,
    engine: Engine,
    ticket: Ticket,
    chat: Chat,
    medium: Medium | None,
    completion: answers.Completion,
  ):
    super().__init__()
    self._engine, self._ticket, self._chat = engine, ticket, chat
    self._medium, self._completion = medium, completion

  async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
    gone = asyncio.create_task(_until_gone(receive))
    try:
      if self._chat.stream:
        await self._stream(gone, scope, receive, send)
      else:
        await self._whole(gone, scope, receive, send)
    except ApiError as error:
      await JSONResponse(error.to_dict(), error.status, error.headers)(scope, receive, send)
    except Gone:
      pass
    finally:
      self._ticket.cancel()  # of one that is done, nothing
      gone.cancel()

  async def _whole(self, gone: asyncio.Task, *connection: Any) -> None:
    async for event in _events(self._ticket, gone, None):
      if isinstance(event, Failed):
        raise self._failure(event)
      if isinstance(event, Done):
        self._engine.metrics.answer(event.answer)
        await JSONResponse(self._completion.whole(event.answer))(*connection)

  async def _stream(
    self, gone: asyncio.Task, scope: Any, receive: Callable, send: Callable
  ) -> None:
    with_usage, begun = self._chat.include_usage, False

    async def write(*pieces: bytes) -> None:
      nonlocal begun
      if not begun:
        begun = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        pieces = (self._completion.first(with_usage), *pieces)
      body = b"".join(pieces)
      await send({"type": "http.response.body", "body": body, "more_body": True})

    async for event in _events(self._ticket, gone, KEEP_ALIVE_SECONDS):
      if event is None:
        await write(answers.KEEP_ALIVE)
      elif isinstance(event, Text):
        if event.delta:
          await write(self._completion.piece(event.delta, with_usage))
      elif isinstance(event, Done):
        self._engine.metrics.answer(event.answer)
        await write(*self._completion.last(event.answer, with_usage))
      elif isinstance(event, Failed):
        error = self._failure(event)
        if not begun:
          raise error
        await write(answers.event(dict(error.to_dict())))
    await send({"type": "http.response.body", "body": b"", "more_body": False})

  def _failure(self, event: Failed) -> ApiError:
    if isinstance(event.error, Cancelled):
      raise Gone
    if isinstance(event.error, InputError):
      return refusal(event.error, self._medium)
    log.error("a fault of the server", exc_info=event.error)
    return ApiError(500, "a fault of the server; its log says more")


async def _until_gone(receive: Callable) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass


async def _events(
  ticket: Ticket, gone: asyncio.Task, silence: float | None
) -> AsyncIterator[Event | None]:
  """The events of a ticket; None after so many seconds without one. Raises Gone."""
  events = aiter(ticket)
  event: Event | None = None
  while not isinstance(event, Done | Failed):
    step = asyncio.ensure_future(anext(events))
    try:
      while not step.done():
        await asyncio.wait({step, gone}, timeout=silence, return_when=asyncio.FIRST_COMPLETED)
        if not step.done():
          if gone.done():
            raise Gone
          yield None
    finally:
      step.cancel()  # of one that is done, nothing
    event = step.result()
    yield event


async def _text(request: Request) -> str:
  """The body as text; its bytes are not kept beside it."""
  body = bytearray()
  try:
    async for piece in request.stream():
      body += piece
  except ClientDisconnect:
    raise ApiError(400, "the body breaks off") from None
  try:
    return body.decode()
  except UnicodeDecodeError as error:
    raise ApiError(400, f"the body is not UTF-8 ({error.reason})", code="invalid_json") from None


def _described(medium: Medium, with_times: bool) -> Mapping[str, Any]:
  info = medium.info
  height, width = info.size
  record = {
    "id": medium.id,
    "name": medium.name,
    "kind": info.kind,
    "frames": info.frames,
    "fps": info.fps,
    "size": [width, height],
    "duration": info.duration,
    "playable": bool(info.playable),
    "rotation": info.rotation,
    "mirrored": info.mirrored,
    "claimed": info.claimed,
    "warnings": list(info.warnings()),
  }
  if with_times:
    record["times"] = None if info.times is None else info.times.tolist()
  return record


def _json_body(description: str) -> dict[str, Any]:
  schema = {"type": "object", "required": ["model", "messages"], "additionalProperties": True}
  content = {"application/json": {"schema": schema}}
  return {"requestBody": {"required": True, "description": description, "content": content}}


_FILE_BODY = {
  "requestBody": {
    "required": True,
    "content": {
      "multipart/form-data": {
        "schema": {
          "type": "object",
          "required": ["file"],
          "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string"},
          },
        }
      }
    },
  }
}
