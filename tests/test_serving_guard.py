"""Who may call: hosts, origins and keys on every route that the server has, and bodies too long."""

import asyncio
import re

import httpx
import pytest

from data_pipes.errors import InputError
from vr_jax.serving import guard as guard_module
from vr_jax.serving.app import make_app
from vr_jax.serving.engine import Engine, model_name
from vr_jax.serving.guard import OPEN, Guard
from vr_jax.serving.media import MediaOptions, Store
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
