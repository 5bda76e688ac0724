"""Who may call: hosts, origins and keys on every route that the server has, and bodies too long."""

import asyncio
import json
import re
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest

from data_pipes.errors import InputError
from vr_jax.inference.options import Options
from vr_jax.inference.requests import Answer, Request
from vr_jax.inference.tickets import Busy, Closed, Text, Ticket
from vr_jax.serving import app as app_module
from vr_jax.serving import guard as guard_module
from vr_jax.serving.answers import Completion
from vr_jax.serving.app import make_app
from vr_jax.serving.clips import ClipInfo
from vr_jax.serving.engine import Engine, model_name, refusal
from vr_jax.serving.guard import OPEN, Guard
from vr_jax.serving.media import MediaOptions, Medium, Store
from vr_jax.serving.settings import Capacity, Keys, Listening, read_keys

KEY = "sk-" + "a" * 30
LOCAL, PUBLIC = "http://127.0.0.1:8000", "http://10.0.0.5:8000"


@pytest.fixture
def key_file(tmp_path):
  path = tmp_path / "keys"
  path.write_text(f"# of the lab\n{KEY} alice 2\n{KEY}b bob\n")
  return path


@pytest.fixture
def make_client(tmp_path):
  def make(address=LOCAL, keys=None, **options):
    listening = Listening(**options)
    media = MediaOptions()
    engine = Engine(listening, Capacity(), Store(media, tmp_path / "files"), "vr-mini", 0)
    app = make_app(engine)
    guarded = Guard(app, listening, keys or Keys(), engine.metrics, media.max_upload)
    transport = httpx.ASGITransport(guarded, raise_app_exceptions=False)
    return Client(httpx.AsyncClient(transport=transport, base_url=address), app)

  return make


class Client:
  """The app in this process, called one request after the other."""

  def __init__(self, client, app):
    self._client, self.app = client, app

  def __call__(self, method, path, **options):
    return asyncio.run(self._client.request(method, path, **options))

  def routes(self):
    """(method, path) of every route, with something in the place of its parameters."""
    for route in self.app.routes:
      path = re.sub(r"\{[^}]*\}", "0", route.path)
      yield from ((method, path) for method in sorted(route.methods))


def kind(response):
  return response.json()["error"]["type"]


HOSTS = ("evil.example", "127.0.0.1.evil.example", "localhost:99999999", "a b", "127.0.0.1, evil")


def test_no_route_answers_to_another_host_or_a_page_of_another_origin(make_client):
  client = make_client()
  routes = list(client.routes())
  assert ("POST", "/v1/chat/completions") in routes
  for method, path in routes:
    for host in HOSTS:
      response = client(method, path, headers={"host": host})
      assert response.status_code == 403, (method, path, host)
    for headers in (
      {"origin": "https://evil.example"},
      {"origin": "null"},
      {"sec-fetch-site": "cross-site"},
    ):
      response = client(method, path, headers=headers)
      assert response.status_code == 403, (method, path, headers)
      assert "x-request-id" in response.headers


def test_every_route_but_the_open_ones_needs_a_key(make_client, key_file):
  client = make_client(PUBLIC, read_keys(str(key_file)), host="0.0.0.0", key_file=str(key_file))
  for method, path in client.routes():
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {KEY}"}):
      response = client(method, path, headers=headers)
      assert (response.status_code == 401) == (path not in OPEN), (method, path, headers)
    response = client(method, path, headers={"authorization": f"Bearer {KEY}"})
    assert response.status_code not in (401, 403), (method, path)
  assert kind(client("GET", "/v1/models")) == "authentication_error"


def test_names_that_are_allowed_answer(make_client, key_file):
  keys = read_keys(str(key_file))
  options = {"host": "0.0.0.0", "key_file": str(key_file), "allow_host": ("lab.example",)}
  client = make_client("http://lab.example", keys, **options)
  headers = {"authorization": f"Bearer {KEY}"}
  assert client("GET", "/v1/models", headers=headers).status_code == 200
  assert client("GET", "/v1/models", headers=headers | {"host": "x.example"}).status_code == 403
  own_page = headers | {"origin": "http://lab.example"}
  assert client("GET", "/v1/models", headers=own_page).status_code == 200


def test_a_local_server_without_keys_ignores_one(make_client):
  client = make_client()
  response = client("GET", "/v1/models", headers={"authorization": "Bearer EMPTY"})
  assert response.json()["data"][0]["id"] == "vr-mini"
  assert client("GET", "/v1/models", headers={"host": "[::1]:8000"}).status_code == 200


def test_an_address_for_others_needs_a_key():
  with pytest.raises(InputError, match="accepted: with --key-file"):
    Listening(host="0.0.0.0")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("short", "line 1; accepted: KEY"),
    ("", "holds no key"),
    (f"{KEY} a x", "weight"),
    (f"{KEY} a -1", "weight"),
    (f"{KEY} a\n{KEY}b a", "another key"),
    (f"{KEY} a 1 2", "accepted: KEY"),
  ],
)
def test_a_file_of_keys_that_is_none_is_refused(tmp_path, content, words):
  path = tmp_path / "keys"
  path.write_text(content)
  with pytest.raises(InputError, match=words) as caught:
    read_keys(str(path))
  assert "aaaa" not in str(caught.value)


def test_keys_have_names_and_weights(key_file):
  keys = read_keys(str(key_file))
  assert [(key.name, key.weight) for key in keys.keys] == [("alice", 2.0), ("bob", 1.0)]
  assert keys.match(KEY + "b").name == "bob"
  assert keys.match(KEY + "c") is None


def test_a_body_may_not_be_too_long_or_too_slow(make_client, monkeypatch):
  client = make_client(max_body=1)
  response = client("POST", "/v1/chat/completions", content=b" " * ((1 << 20) + 1))
  assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")

  async def chunks():  # without a content-length
    for _ in range(20):
      yield b" " * (1 << 16)

  assert client("POST", "/v1/chat/completions", content=chunks()).status_code == 413

  async def never():
    yield b"{"
    await asyncio.sleep(5)

  monkeypatch.setattr(guard_module, "PIECE_SECONDS", 0.05)
  assert asyncio.run(_slow(make_client)) == 408


async def _slow(make_client):
  """The status of a request whose body stops; httpx would read it whole first."""
  client = make_client()
  scope = {
    "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
    "headers": [(b"host", b"localhost"), (b"content-length", b"10")], "client": ("127.0.0.1", 1),
    "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8000), "root_path": "",
    "raw_path": b"/v1/chat/completions",
  }  # fmt: skip
  sent = []
  pieces = iter([{"type": "http.request", "body": b"{", "more_body": True}])

  async def receive():
    message = next(pieces, None)
    return message or await asyncio.sleep(5)

  async def send(message):
    sent.append(message)

  await client._client._transport.app(scope, receive, send)
  return sent[0]["status"]


def test_before_it_is_ready_the_server_says_so(make_client):
  client = make_client()
  assert client("GET", "/health").json() == {"status": "ok"}
  response = client("GET", "/health/ready")
  assert (response.status_code, response.headers["retry-after"]) == (503, "1")
  assert kind(response) == "overloaded_error"
  body = {"model": "vr-mini", "messages": [{"role": "user", "content": "Hello?"}]}
  assert client("POST", "/v1/chat/completions", json=body).status_code == 503


def test_unknown_routes_and_ids_have_errors_of_one_shape(make_client):
  client = make_client()
  for method, path, status in (
    ("GET", "/v1/nothing", 404),
    ("GET", "/docs", 404),
    ("GET", "/v1/chat/completions", 405),
    ("GET", "/v1/models/other", 404),
    ("GET", "/v1/files/file-0", 404),
    ("DELETE", "/v1/files/..%2f..%2fetc", 404),
    ("GET", "/v1/vr/media/file-0/frames/1", 404),
    ("POST", "/v1/files", 503),
  ):
    response = client(method, path)
    assert response.status_code == status, path
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_ids_of_requests_are_echoed_or_made(make_client):
  client = make_client()
  given = client("GET", "/health", headers={"x-request-id": "abc-1_2"})
  assert given.headers["x-request-id"] == "abc-1_2"
  for other in ("a" * 65, "a b", "ü"):
    response = client("GET", "/health", headers=[(b"x-request-id", other.encode())])
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_the_page_and_the_schema_need_nothing_from_elsewhere(make_client):
  client = make_client()
  page = client("GET", "/").text
  assert not re.search(r"(?:https?:)?//", page)
  assert "/v1/chat/completions" in client("GET", "/openapi.json").json()["paths"]


def test_metrics_have_their_names(make_client):
  from prometheus_client.parser import text_string_to_metric_families

  client = make_client()
  client("GET", "/health")
  families = {f.name: f for f in text_string_to_metric_families(client("GET", "/metrics").text)}
  assert {
    *("vr_requests", "vr_requests_running", "vr_requests_waiting", "vr_queue_seconds"),
    *("vr_time_to_first_token_seconds", "vr_inter_token_seconds", "vr_request_seconds"),
    *("vr_prompt_tokens", "vr_cached_tokens", "vr_generated_tokens", "vr_rows_busy"),
    *("vr_frames_encoded", "vr_prefix_cache_bytes", "vr_prefix_cache_hits"),
    *("vr_prefix_cache_misses", "vr_media_bytes", "vr_decode_seconds", "vr_cancelled"),
    *("vr_compilations", "vr_build_info"),
  } <= set(families)
  (sample,) = (s for s in families["vr_requests"].samples if s.name == "vr_requests_total")
  assert sample.labels == {"route": "/health", "code": "200", "reason": ""}


def test_a_fault_of_ours_tells_the_client_nothing(make_client, monkeypatch):
  client = make_client()
  monkeypatch.setattr(Engine, "describe", lambda self: 1 / 0)
  response = client("GET", "/v1/models", headers={"x-request-id": "abc"})
  assert response.status_code == 500
  assert "request abc" in response.json()["error"]["message"]
  assert "division" not in response.text


def test_names_of_models_hold_no_path(tmp_path):
  assert model_name(str(tmp_path)) == tmp_path.name
  assert model_name("owner/name@0123") == "owner/name@0123"
  assert model_name("vr-mini") == "vr-mini"


# --- Answers as they are sent, of a ticket that the test writes

CLIP = Path("/srv/secret/clip.mp4")
MEDIUM = Medium("cat.mp4", CLIP, ClipInfo("video", 4, 2.0, (8, 8), np.arange(4) / 2))


@pytest.fixture
def sent(make_client, monkeypatch):
  """What a chat's response holds: its status and its text."""

  def send(ticket, *, stream):
    def ask(self, chat, caller, deadline):
      return ticket, MEDIUM

    monkeypatch.setattr(Engine, "ask", ask)
    monkeypatch.setattr(Engine, "completion", lambda self: Completion("vr-mini", None, str))
    body = {"model": "vr-mini", "messages": [{"role": "user", "content": "?"}], "stream": stream}
    response = make_client()("POST", "/v1/chat/completions", json=body)
    return response.status_code, response.text

  return send


def ticket_of(*events):
  """A ticket that gives texts, and ends with the last."""
  ticket = Ticket(Request(None, ""), Options(), stream=True)
  for text in events[:-1]:
    ticket.add(Text(text, (1,)))
  if events[-1] is not None:
    ticket.end(events[-1])
  return ticket


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
  ("error", "status", "kind"),
  [
    (InputError(f"{CLIP}: damaged video"), 400, "invalid_request_error"),
    (Busy("3 wait"), 429, "rate_limit_error"),
    (Closed("closed"), 503, "overloaded_error"),
    (ZeroDivisionError("division"), 500, "server_error"),
  ],
)
def test_a_failure_before_the_first_piece_is_a_status(sent, stream, error, status, kind):
  code, text = sent(ticket_of(error), stream=stream)
  assert (code, json.loads(text)["error"]["type"]) == (status, kind)
  assert "/srv" not in text
  assert "division" not in text


def test_a_failure_in_a_stream_is_its_last_event(sent):
  code, text = sent(ticket_of("a cat", InputError(f"{CLIP}: damaged video")), stream=True)
  assert code == 200
  *_, last, rest = text.split("\n\n")
  assert json.loads(last.removeprefix("data: "))["error"]["message"] == "cat.mp4: damaged video"
  assert not rest
  assert "[DONE]" not in text


def test_a_silent_stream_says_that_it_lives(sent, monkeypatch):
  monkeypatch.setattr(app_module, "KEEP_ALIVE_SECONDS", 0.02)
  ticket = ticket_of(None)
  timer = threading.Timer(0.2, ticket.end, (Answer("a cat", (1, 2), (), (), ()),))
  timer.start()
  code, text = sent(ticket, stream=True)
  assert code == 200
  assert text.count(": keep-alive\n\n") > 1
  assert text.endswith("data: [DONE]\n\n")


def test_busy_and_ending_servers_say_when_to_ask_again():
  assert refusal(Busy("3 wait"), None).headers == {"retry-after": "1"}
  assert refusal(Closed("closed"), None).code == "draining"
