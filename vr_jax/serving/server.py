"""The process: its address, its signals, its end.

SIGTERM, Ctrl-C ─► no more requests (503) ─► answers under way end whole ─► exit code 0
a second one    ─► they are cancelled
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from data_pipes.errors import InputError
from data_pipes.files import locked
from vr_jax.inference.model import Model
from vr_jax.serving.app import make_app
from vr_jax.serving.engine import Engine
from vr_jax.serving.guard import Guard
from vr_jax.serving.media import MediaOptions, Store
from vr_jax.serving.settings import Capacity, Keys, Listening, read_keys

HEAD_SECONDS = 20.0  # that a client may take for the head of a request
CONNECTIONS = 1024
log = logging.getLogger("vr.serve")


def serve(
  load: Callable[[], Model],
  checkpoint: Callable[[], str | None],
  model_id: str,
  listening: Listening,
  capacity: Capacity,
  media: MediaOptions,
) -> None:
  """Serves until a signal ends it.

  Args:
    load: gives the model; called in a thread while the server says 503.
    checkpoint: gives the hash of its weights.

  Raises:
    InputError: the address, a file that is named, the media folder, the model.
  """
  keys = Keys() if listening.key_file is None else read_keys(listening.key_file)
  _log_to_stderr()
  with _listen(listening) as listener, tempfile.TemporaryDirectory(prefix="vr-media-") as scratch:
    folder = Path(media.media_dir or scratch)
    with locked(folder, f"vr serve {time.time()}"):
      store = Store(media, folder / "files")
      engine = Engine(listening, capacity, store, model_id, int(time.time()))
      server = _Server(_application(engine, listening, keys, media), engine, listener)
      thread = threading.Thread(
        target=server.load, args=(load, checkpoint), name="vr-load", daemon=True
      )
      thread.start()
      server.run(sockets=[listener])
      engine.close()
  if thread.is_alive():  # in the compiler, where the end of Python would crash it
    os._exit(0)
  if engine.failure is not None:
    raise engine.failure


def _application(engine: Engine, listening: Listening, keys: Keys, media: MediaOptions) -> Any:
  app: Any = make_app(engine)
  if listening.allow_origin:
    app = CORSMiddleware(
      app, listening.allow_origin, allow_methods=["*"], allow_headers=["*"],
      expose_headers=["x-request-id", "retry-after"],
    )  # fmt: skip
  return Guard(app, listening, keys, engine.metrics, media.max_upload)


def _listen(listening: Listening) -> socket.socket:
  family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
  try:
    return socket.create_server((listening.host.strip("[]"), listening.port), family=family)
  except OSError as error:
    reason = error.strerror or str(error)
    raise InputError(
      f"--host {listening.host} --port {listening.port}: {reason}; accepted: a free port of an "
      "address of this machine"
    ) from None


def _log_to_stderr() -> None:
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
  for name, level in (("vr.serve", logging.INFO), ("uvicorn", logging.WARNING)):
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


class _Server(uvicorn.Server):
  """Ends after the answers under way; its exit code is not that of the signal."""

  def __init__(self, app: Any, engine: Engine, listener: socket.socket):
    super().__init__(
      uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False,
        lifespan="off", ws="none", http=_Protocol, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
      )
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    self._engine, self._signals = engine, 0

  def load(self, load: Callable[[], Model], checkpoint: Callable[[], str | None]) -> None:
    """Loads the model; a failure ends the server."""
    print(f"vr serve: {self.url} loads {self._engine.model_id}", file=sys.stderr, flush=True)
    try:
      self._engine.start(load, checkpoint())
      print(f"vr serve: {self.url} is ready", file=sys.stderr, flush=True)
    except BaseException as error:
      self._engine.failure = error
      self.should_exit = True

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    self._signals += 1
    if self._signals == 1:
      seconds = self._engine.listening.drain_timeout
      log.info("%s: answers under way have %g s", signal.Signals(sig).name, seconds)
      threading.Thread(target=self._drain, args=(seconds,), name="vr-drain", daemon=True).start()
    else:
      self.should_exit = self.force_exit = True

  def _drain(self, seconds: float) -> None:
    self._engine.drain(seconds)
    self.should_exit = True  # what is left of the responses is sent first


class _Protocol(H11Protocol):
  """Closes connections whose request does not come."""

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    super().connection_made(transport)
    asyncio.get_running_loop().call_later(HEAD_SECONDS, self._close_if_silent)

  def _close_if_silent(self) -> None:
    if self.cycle is None and not self.transport.is_closing():
      self.transport.close()
