"""A model under a service, from the start of the server to its end."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from data_pipes.errors import InputError
from vr_jax.inference.model import Model
from vr_jax.inference.service import Service
from vr_jax.inference.tickets import Busy, Closed, Ticket
from vr_jax.serving.answers import Completion
from vr_jax.serving.body import Node
from vr_jax.serving.chat import Chat
from vr_jax.serving.errors import ApiError
from vr_jax.serving.media import Medium, Store
from vr_jax.serving.metrics import Metrics
from vr_jax.serving.objects import to_request
from vr_jax.serving.settings import Capacity, Listening


@dataclass(frozen=True)
class Caller:
  """Whose request it is: owner of files, client whose turn it takes, weight of its turns."""

  owner: str = ""
  client: str = ""
  weight: float = 1.0


class Engine:
  """What the routes share.

  Attributes:
    model_id: the model's name for clients.
    checkpoint: hash of the weights, once they are there.
    failure: why the model could not be loaded.
  """

  def __init__(
    self, listening: Listening, capacity: Capacity, store: Store, model_id: str, created: int
  ):
    self.listening, self.capacity, self.store = listening, capacity, store
    self.model_id, self._created = model_id, created
    self.checkpoint: str | None = None
    self.failure: BaseException | None = None
    self.metrics = Metrics(self._levels)
    self._model: Model | None = None
    self._service: Service | None = None
    self._draining = False
    self._lock = threading.Lock()

  def start(self, load: Callable[[], Model], checkpoint: str | None) -> None:
    """Loads the model and compiles what it needs; requests are taken from then on."""
    capacity = self.capacity
    model = load()
    service = Service(
      model,
      rows=capacity.rows,
      question_slots=capacity.question_tokens,
      new_tokens=capacity.new_tokens,
      scene_frames=list(capacity.scene_frames) or None,
      queue=capacity.queue,
      per_client=capacity.per_client,
      media_memory=capacity.media_memory << 20,
      literal=True,
    )
    with self._lock:
      self._model, self._service, self.checkpoint = model, service, checkpoint
    if self._draining:
      service.close(0)

  @property
  def is_ready(self) -> bool:
    return self._service is not None and not self._draining

  def check_open(self) -> None:
    """Raises ApiError 503 where no requests are taken."""
    if self._draining:
      raise ApiError(503, "the server is ending", code="draining")
    if self._service is None:
      raise ApiError(503, "the model is being loaded", code="warming_up")
    if not self._service.ready:
      raise ApiError(503, "the engine has ended", code="failed")

  def drain(self, seconds: float) -> None:
    """Takes no more requests; returns when those under way are answered, or after the time."""
    self._draining = True
    if self._service is not None:
      self._service.drain(seconds)

  def close(self) -> None:
    """Ends what is under way."""
    self._draining = True
    if self._service is not None:
      self._service.close(0)

  # --- Requests

  def ask(self, chat: Chat, caller: Caller, deadline: float | None) -> tuple[Ticket, Medium | None]:
    """Puts a request into the queue; the ticket of its answer, and its clip.

    Raises:
      ApiError: it cannot be answered, or not now.
    """
    self.check_open()
    assert self._service is not None
    self._check(chat)
    medium = None if chat.media is None else self.store.resolve(chat.media, caller.owner)
    try:
      ticket = self._service.submit(
        to_request(chat, medium),
        client=caller.client,
        weight=caller.weight,
        deadline=deadline,
        stream=chat.stream,
        **self._options(chat),
      )
    except InputError as error:
      raise refusal(error, medium) from None
    return ticket, medium

  def completion(self) -> Completion:
    return Completion(self.model_id, self.checkpoint, self._token_text)

  def check_name(self, node: Node) -> None:
    if node.value not in (self.model_id, self.model_id.partition("@")[0]):
      raise ApiError(
        404, f"model {node.value!r}; accepted: {self.model_id}", param="model",
        code="model_not_found",
      )  # fmt: skip

  def _check(self, chat: Chat) -> None:
    """Refuses what the engine was not declared for, and names the option that declares it."""
    self.check_name(Node(chat.model, "model"))
    most, given = self.capacity.new_tokens, chat.given
    if chat.options.get("max_new_tokens", 1) > most:
      raise given["max_new_tokens"].error(f"up to {most} (--new-tokens)")
    if "scene_frames" in given and chat.options["scene_frames"] not in self._scenes:
      accepted = ", ".join(map(str, self._scenes))
      raise given["scene_frames"].error(f"{accepted} (--scene-frames)")

  def _options(self, chat: Chat) -> Mapping[str, Any]:
    """The request's options, as the service takes them."""
    options = dict(chat.options)
    if "scene_frames" in options and not self.capacity.scene_frames:
      del options["scene_frames"]  # that of training, which the service knows by None
    return options

  @property
  def _scenes(self) -> tuple[int, ...]:
    assert self._model is not None
    return self.capacity.scene_frames or (self._model.cfg.num_frames,)

  # --- What the model is

  def _token_text(self, token_id: int) -> str:
    assert self._model is not None
    return self._model.tokenizer.decode([token_id], skip_special=False)

  def describe(self) -> dict[str, Any]:
    """The model as OpenAI's object; what is not known before it is loaded is null."""
    model, capacity = self._model, self.capacity
    more: dict[str, Any] = {}
    if model is not None and self._service is not None:
      more = {
        "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(model.params)),
        "scene_frames": list(self._scenes),
        "mask_rule": self._service.options.mask_rule,
        "weights": model.weights,
        "checkpoint_sha256": self.checkpoint,
        "revision": self.model_id.partition("@")[2] or None,
        "limits": {
          "rows": self._service.limits.rows,
          "new_tokens": capacity.new_tokens,
          "question_tokens": self._service.limits.question_slots,
          "queue": capacity.queue,
          "per_client": capacity.per_client,
          "body_mib": self.listening.max_body,
          "upload_mib": self.store.options.max_upload,
          "pixels": self.store.options.max_pixels,
          "frames": self.store.options.max_frames,
          "seconds": self.store.options.max_seconds,
        },
        "propagators": [],
      }
    return {
      "id": self.model_id,
      "object": "model",
      "created": self._created,
      "owned_by": "vr_jax",
      "vr": more,
    }

  def _levels(self) -> Mapping[str, float]:
    counts: dict[str, float] = {"media_bytes": self.store.bytes}
    return counts if self._service is None else {**counts, **self._service.metrics()}


def model_name(checkpoint_name: str) -> str:
  """The name of a checkpoint for clients: of a folder its last part, never a path."""
  if checkpoint_name.count("/") == 1 and not Path(checkpoint_name).exists():
    return checkpoint_name.removeprefix("hf:")  # OWNER/NAME@COMMIT
  return Path(checkpoint_name).resolve().name


def refusal(error: InputError, medium: Medium | None) -> ApiError:
  """What the service refused, as a client is told it: its clip by its name."""
  text = str(error) if medium is None else medium.without_path(error)
  if isinstance(error, Busy):
    return ApiError(429, text, code="queue_full")
  if isinstance(error, Closed):
    return ApiError(503, "the server is ending", code="draining")
  return ApiError(400, text, param="messages")
