"""`vr serve` as a process: real clients ask it, leave it, and are rude to it."""

import asyncio
import base64
import concurrent.futures
import copy
import json
import random
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest
from serving_process import ServerProcess

import vr_jax
from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.inference.model import Model
from vr_jax.inference.options import Options
from vr_jax.inference.requests import Answer
from vr_jax.inference.tickets import Ticket
from vr_jax.serving import batch
from vr_jax.serving.answers import Completion
from vr_jax.serving.engine import Engine
from vr_jax.serving.media import MediaOptions
from vr_jax.serving.settings import Capacity

SIZES = ("--rows", "1", "--new-tokens", "64", "--question-tokens", "64", "--scene-frames", "4")
OPTIONS = {"scene_frames": 4, "max_new_tokens": 8, "batch_size": 1}
BOX = {"box": [6, 6, 40, 44], "frame": 3}
QUESTION = "What is <region> doing?"


@pytest.fixture(scope="module")
def folder(golden) -> Path:
  return golden / "tiny_videorefer_qwen2"


@pytest.fixture(scope="module")
def server(folder, golden, programs_on_disk):
  running = ServerProcess(
    "--checkpoint", str(folder), "--media-root", str(golden / "media"), *SIZES
  )
  yield running
  assert running.end() == 0


@pytest.fixture(scope="module")
def clip(golden) -> Path:
  return golden / "media/clip_mp4.mp4"


@pytest.fixture(scope="module")
def model(folder) -> Model:
  return vr_jax.load(folder)


@pytest.fixture(scope="module")
def answer(model, clip) -> str:
  """What `Model.ask` says."""
  region = vr_jax.Region(box=tuple(BOX["box"]), frame=BOX["frame"])
  return model.ask(clip, QUESTION, [region], **OPTIONS).text


@pytest.fixture(scope="module")
def client(server):
  return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def name(server):
  return json.loads(server.get("/v1/models"))["data"][0]["id"]


def asking(clip, words=QUESTION, *, region=BOX, **fields):
  """The body of a request about a clip below the media root."""
  url = clip if isinstance(clip, str) else f"file://{clip}"
  content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": words}]
  content += [{"type": "region", "region": region}] if region else []
  messages = [{"role": "user", "content": content}]
  return {"model": "tiny_videorefer_qwen2", "messages": messages, "max_tokens": 8, **fields}


def post(server, body, **options):
  return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120, **options)


def streamed(response):
  """The records of a stream, and whether it ended whole."""
  events = [e for e in response.text.split("\n\n") if e and not e.startswith(":")]
  is_whole = events[-1] == "data: [DONE]"
  return [json.loads(e.removeprefix("data: ")) for e in events if e != "data: [DONE]"], is_whole


# --- Clients


def test_a_clip_below_a_root_is_answered_as_by_ask(server, clip, answer):
  record = post(server, asking(clip)).json()
  choice = record["choices"][0]
  assert choice["message"] == {"role": "assistant", "content": answer, "refusal": None}
  assert choice["finish_reason"] in ("stop", "length")
  usage = record["usage"]
  assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
  assert record["vr"]["objects"][0]["tokens"] == [[3]]
  assert len(record["vr"]["scene_frames"]) == 4
  assert set(record["vr"]["timings"]) == {
    "queue_ms", "media_ms", "encode_ms", "first_token_ms", "total_ms",
  }  # fmt: skip
  assert len(record["vr"]["checkpoint"]) == 64


def test_the_openai_client_uploads_asks_and_asks_again(client, server, clip, answer):
  with open(clip, "rb") as content:
    file = client.files.create(file=content, purpose="user_data")
  assert (file.filename, file.bytes) == (clip.name, clip.stat().st_size)
  body = asking(file.id)
  reply = client.chat.completions.create(**body)
  assert reply.choices[0].message.content == answer
  assert reply.vr["objects"][0]["tokens"] == [[3]]
  again = client.chat.completions.create(**body)
  assert again.usage.prompt_tokens_details.cached_tokens > 0
  by_field = asking(file.id, region=None)
  reply = client.chat.completions.create(**by_field, extra_body={"regions": [BOX]})
  assert reply.choices[0].message.content == answer
  assert [entry.id for entry in client.files.list()] == [file.id]
  assert client.files.delete(file.id).deleted
  with pytest.raises(openai.NotFoundError) as caught:
    client.chat.completions.create(**body)
  assert caught.value.body["param"] == "messages[0].content[0].video_url.url"


def test_the_openai_client_streams(client, clip, answer):
  stream = client.chat.completions.create(
    **asking(clip), stream=True, stream_options={"include_usage": True}
  )
  chunks = list(stream)
  deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
  assert all(isinstance(delta.content, str) for delta in deltas)
  assert deltas[0].role == "assistant"
  assert "".join(delta.content for delta in deltas) == answer
  assert chunks[-2].choices[0].finish_reason in ("stop", "length")
  assert chunks[-2].vr["objects"]
  assert chunks[-1].usage.completion_tokens > 0
  assert not chunks[-1].choices


def test_the_async_client_asks_many_at_once(server, clip, answer):
  async def all_of_them():
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
    async with client:
      body = asking(clip)
      return await asyncio.gather(*(client.chat.completions.create(**body) for _ in range(8)))

  replies = asyncio.run(all_of_them())
  assert {reply.choices[0].message.content for reply in replies} == {answer}
  assert server.metric("vr_compilations_total") == 0


def test_every_way_to_send_a_clip_and_a_region_gives_one_answer(server, clip, answer):
  data = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
  spec = "What is <region box:6,6,40,44@3> doing?"
  polygon = {"polygon": [[6, 6], [40, 6], [40, 44], [6, 44]], "frame": 3}
  bodies = [
    asking(data),
    asking(clip, spec, region=None),
    asking(clip, region=None, regions=[{**BOX, "frame": "0.3s"}]),
    asking(clip, region={"box": [6 / 96, 6 / 64, 40 / 96, 44 / 64], "coordinates": "relative",
                         "frame": 3}),
  ]  # fmt: skip
  assert {post(server, b).json()["choices"][0]["message"]["content"] for b in bodies} == {answer}
  assert post(server, asking(clip, region=polygon)).status_code == 200


def test_sampling_logprobs_and_stops(server, clip):
  drawn = [
    post(server, asking(clip, temperature=1.5, seed=7, top_p=0.9)).json()["choices"][0]["message"]
    for _ in range(2)
  ]
  assert drawn[0] == drawn[1]
  choice = post(server, asking(clip, logprobs=True, top_logprobs=2)).json()["choices"][0]
  scores = choice["logprobs"]["content"]
  assert all(len(score["top_logprobs"]) == 2 for score in scores)
  assert all(score["logprob"] <= 0 for score in scores)
  text = choice["message"]["content"]
  stopped = post(server, asking(clip, stop=[text[2:4]])).json()["choices"][0]
  assert stopped["message"]["content"] == text[: text.index(text[2:4])].strip()
  assert stopped["finish_reason"] == "stop"


def test_a_conversation_goes_on(client, clip, answer):
  body = asking(clip)
  first = client.chat.completions.create(**body)
  turns = [
    *body["messages"],
    {"role": "assistant", "content": answer},
    {"role": "user", "content": "And then?"},
  ]
  reply = client.chat.completions.create(**{**body, "messages": turns})
  assert reply.usage.prompt_tokens > first.usage.prompt_tokens


def test_text_without_media_is_answered(server):
  body = {"model": "tiny_videorefer_qwen2", "max_tokens": 4,
          "messages": [{"role": "user", "content": "Hello <|im_end|> <video>"}]}  # fmt: skip
  reply = post(server, body)
  assert reply.status_code == 200, reply.text
  assert reply.json()["vr"]["objects"] == []


def test_what_the_engine_was_not_declared_for_names_the_option(server, clip):
  for fields, param, words in (
    ({"max_tokens": 65}, "max_tokens", "--new-tokens"),
    ({"vr": {"scene_frames": 5}}, "vr.scene_frames", "--scene-frames"),
    ({"model": "gpt-4o"}, "model", "tiny_videorefer_qwen2"),
  ):
    error = post(server, asking(clip, **fields)).json()["error"]
    assert error["param"] == param
    assert words in error["message"]
  long = post(server, asking(clip, f"{QUESTION} " + "why " * 500))
  assert (long.status_code, long.json()["error"]["param"]) == (400, "messages")


@pytest.fixture
def run_batch(tmp_path, clip):
  """Runs a batch of some bodies in one folder: its summary, and the records that it left."""
  requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  capacity = Capacity(rows=1, new_tokens=64, question_tokens=64, scene_frames=(4,))
  media = MediaOptions(media_root=(str(clip.parent),))

  def run(bodies, load=None, checkpoint="a"):
    lines = [
      json.dumps({"custom_id": f"q{i}", "method": "POST", "url": batch.URL, "body": body})
      for i, body in enumerate(bodies)
    ]
    requests.write_text("\n".join(lines))
    name = "tiny_videorefer_qwen2"
    summary = batch.run(load, checkpoint, name, requests, out, capacity, media)
    return summary, [json.loads(line) for line in out.read_text().splitlines()]

  return run


def test_a_batch_goes_on_and_tells_other_requests_from_its_own(run_batch, clip, monkeypatch):
  def ask(self, chat, caller, deadline):
    ticket = Ticket(vr_jax.Request(None, ""), Options())
    ticket.end(Answer(f"seed {chat.options['seed']}", (1,), (), (), ()))
    return ticket, None

  monkeypatch.setattr(Engine, "start", lambda *_: None)
  monkeypatch.setattr(Engine, "ask", ask)
  monkeypatch.setattr(Engine, "completion", lambda self: Completion("m", None, str))
  bodies = [asking(clip, seed=i) for i in range(3)]
  bad = asking(clip, max_tokens=0)
  summary, records = run_batch([*bodies[:2], bad])
  assert summary == batch.Summary(2, 1, 0)
  assert [r["custom_id"] for r in records] == ["q0", "q1", "q2"]
  texts = [r["response"]["body"]["choices"][0]["message"]["content"] for r in records[:2]]
  assert texts == ["seed 0", "seed 1"]
  assert records[2]["response"]["status_code"] == 400
  assert records[2]["response"]["body"]["error"]["param"] == "max_tokens"
  summary, records = run_batch(bodies)
  assert (summary, len(records)) == (batch.Summary(1, 0, 2), 3)
  with pytest.raises(InputError, match="other weights"):
    run_batch(bodies, checkpoint="b")
  with pytest.raises(InputError, match="answers another request"):
    run_batch(bodies[1:])


@pytest.mark.slow
def test_a_batch_is_answered_as_by_the_server(server, run_batch, model, clip):
  bodies = [asking(clip), asking(clip, temperature=1.0, seed=3)]
  _, records = run_batch(bodies, lambda: model)
  choices = [record["response"]["body"]["choices"] for record in records]
  assert choices == [post(server, body).json()["choices"] for body in bodies]


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("{", "line 1: cannot be read as JSON"),
    ("[]", "an object"),
    ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', batch.URL),
    ('{"custom_id": "a", "url": "/v1/chat/completions", "body": []}', "an object"),
    ('{"url": "/v1/chat/completions", "body": {}}', "custom_id"),
    ('{"customid": "a"}', "did you mean 'custom_id'"),
  ],
)
def test_a_line_of_a_batch_that_is_none_is_named(tmp_path, line, words):
  path = tmp_path / "in.jsonl"
  path.write_text(line)
  with pytest.raises(InputError, match=re.escape(words)):
    batch.read_lines(path)


# --- The documentation

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (DOCS / "serving.md").read_text(), re.DOTALL)


def test_every_block_of_the_documentation_runs(server, clip, golden, monkeypatch, capfd):
  monkeypatch.chdir(clip.parent)
  scope = {}
  for language, block in BLOCKS:
    block = block.replace("http://localhost:8000", server.url).replace("clip.mp4", clip.name)
    block = block.replace("vr-mini", "tiny_videorefer_qwen2")
    if language == "python":
      exec(block, scope)
    elif block.startswith("curl"):
      done = subprocess.run(["bash", "-c", block], check=True, capture_output=True, text=True)
      assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    else:
      for line in block.splitlines():
        if line.startswith("vr "):
          cli.parse(line.split()[1:])
        else:
          assert line == "pip install 'vr-jax[serve]'"
  assert scope["answer"].vr["objects"][1]["name"] == "cup"
  assert capfd.readouterr().out.strip()


def test_the_dashboard_and_the_table_name_metrics_that_there_are(server):
  samples = {
    line.split("{")[0].split(" ")[0] for line in server.get("/metrics").decode().splitlines()
  }
  names = set(re.findall(r"vr_[a-z_]+", (DOCS / "serving-grafana.json").read_text()))
  table = set(re.findall(r"`(vr_[a-z_]+)`", (DOCS / "serving.md").read_text()))
  assert names <= samples
  assert {n for n in table if n not in samples and f"{n}_count" not in samples} == set()


# --- Clients that leave, and rude ones


def test_a_client_that_leaves_frees_its_row(server, clip):
  for streams in (True, False):
    body = json.dumps(asking(clip, max_tokens=64, stream=streams)).encode()
    before = server.metric("vr_cancelled_total")
    connections = [_send(server, body) for _ in range(4)]
    time.sleep(0.1)
    for connection in connections:
      connection.close()
    _until(lambda: _is_idle(server))
    assert server.metric("vr_cancelled_total") >= before
  assert post(server, asking(clip)).status_code == 200


def _send(server, body, head="POST /v1/chat/completions HTTP/1.1"):
  host, port = server.url.removeprefix("http://").split(":")
  connection = socket.create_connection((host, int(port)), timeout=60)
  lines = [head, f"Host: {host}:{port}", "Content-Type: application/json"]
  lines += [f"Content-Length: {len(body)}", "", ""]
  connection.sendall("\r\n".join(lines).encode() + body)
  return connection


def _is_idle(server):
  names = ("vr_requests_running", "vr_requests_waiting", "vr_rows_busy")
  return not any(server.metric(name) for name in names)


def _until(condition, seconds=60):
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.05)


def _disconnects(server, clip, count):
  """Random closes, at any time from before the request is whole to behind its answer."""
  chance = random.Random(0)
  body = json.dumps(asking(clip, stream=True, max_tokens=16)).encode()

  def leave(seconds):
    connection = _send(server, body[: chance.choice((10, len(body), len(body)))])
    time.sleep(seconds)
    connection.close()

  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    list(threads.map(leave, [chance.uniform(0, 0.3) for _ in range(count)]))
  _until(lambda: _is_idle(server))
  assert post(server, asking(clip)).status_code == 200


def test_random_disconnects_leave_nothing(server, clip):
  _disconnects(server, clip, 24)


@pytest.mark.slow
def test_a_thousand_random_disconnects_leave_memory_flat(server, clip):
  _disconnects(server, clip, 200)
  before = server.memory()
  _disconnects(server, clip, 1000)
  assert server.memory() < 1.05 * before


RUDE = (
  None, True, -1, 0, 10**9, 10**40, 1e308, "", "x" * 1000, "\u0000", "../../etc/passwd", [], {},
  [[[[[[]]]]]], {"a": {"b": []}}, "file:///etc/passwd", "https://127.0.0.1/", "data:,", "NaN",
)  # fmt: skip


def _mutated(chance, body):
  """A body with one of its values, at any depth, replaced, dropped or doubled."""
  body = copy.deepcopy(body)
  places = []

  def walk(value):
    for key in value if isinstance(value, dict) else range(len(value)):
      places.append((value, key))
      if isinstance(value[key], dict | list):
        walk(value[key])

  walk(body)
  holder, key = chance.choice(places)
  way = chance.randrange(4)
  if way == 0:
    del holder[key]
  elif way == 1 and isinstance(holder, dict):
    holder[f"{key}s"] = holder.pop(key)
  elif way == 2 and isinstance(holder, list):
    holder.insert(key, holder[key])
  else:
    holder[key] = chance.choice(RUDE)
  return body


def _mutations(server, clip, count):
  chance = random.Random(1)
  whole = asking(
    clip, temperature=0.0, seed=1, stop=["x"], vr={"mask_rule": "keep"}, logprobs=True,
    region={"masks": {"3": {"size": [64, 96], "counts": [0, 100, 6044]}}, "name": "cat"},
  )  # fmt: skip
  whole["max_tokens"] = 2
  assert post(server, whole).status_code == 200
  refused = 0
  with httpx.Client(base_url=server.url, timeout=120) as client:
    for _ in range(count):
      body = _mutated(chance, whole)
      reply = client.post("/v1/chat/completions", json=body)
      if reply.status_code == 200:  # the mutation left a request that means something
        continue
      refused += 1
      assert 400 <= reply.status_code < 500, (body, reply.text)
      error = reply.json()["error"]
      assert error["param"] is not None, (body, error)
      assert "Traceback" not in reply.text
      assert "/tmp/vr-media-" not in reply.text
      assert str(clip.parent) not in error["message"].replace(f"file://{clip}", ""), error
  assert refused > count / 2
  assert post(server, asking(clip)).status_code == 200


def test_mutated_bodies_are_refused_by_name(server, clip):
  _mutations(server, clip, 60)


@pytest.mark.slow
def test_six_hundred_mutated_bodies_are_refused_by_name(server, clip):
  _mutations(server, clip, 600)


@pytest.mark.parametrize(
  "content", [b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"model": NaN}', b"7" * 9000]
)
def test_bodies_that_are_no_json_are_refused(server, content):
  reply = httpx.post(f"{server.url}/v1/chat/completions", content=content, timeout=60)
  assert reply.status_code == 400
  assert "Traceback" not in reply.text


def test_half_an_upload_leaves_nothing(server):
  before = server.metric("vr_media_bytes")
  connection = _send(server, b"", head="POST /v1/files HTTP/1.1")
  connection.close()
  host, port = server.url.removeprefix("http://").split(":")
  connection = socket.create_connection((host, int(port)))
  connection.sendall(
    f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 99999\r\n"
    "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data; "
    'name="file"; filename="a.mp4"\r\n\r\nabc'.encode()
  )
  connection.close()
  assert server.metric("vr_media_bytes") == before
  reply = httpx.post(f"{server.url}/v1/files", data={"purpose": "x"}, timeout=60)
  assert (reply.status_code, reply.json()["error"]["param"]) == (400, "file")


# --- Playback over HTTP


def test_frames_and_playback_over_http(server, clip):
  with open(clip, "rb") as content:
    file = httpx.post(f"{server.url}/v1/files", files={"file": content}, timeout=60).json()
  base = f"{server.url}/v1/vr/media/{file['id']}"
  info = httpx.get(base, params={"times": 1}).json()
  assert (info["frames"], info["size"], info["playable"]) == (40, [96, 64], True)
  assert len(info["times"]) == 40
  frame = httpx.get(f"{base}/frames/3")
  assert frame.headers["content-type"] == "image/jpeg"
  again = httpx.get(f"{base}/frames/3", headers={"if-none-match": frame.headers["etag"]})
  assert again.status_code == 304
  for path, status in (("frames/40", 404), ("frames/x", 400), ("frames/3?width=0", 400),
                       ("frames/3?format=svg", 400)):  # fmt: skip
    assert httpx.get(f"{base}/{path}").status_code == status
  part = httpx.get(f"{base}/play", headers={"range": "bytes=10-19"})
  assert (part.status_code, part.content) == (206, clip.read_bytes()[10:20])


# --- The end


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (("--host", "0.0.0.0"), "--key-file"),
    (("--media-root", "/absent"), "no such folder"),
    (("--key-file", "/absent"), "cannot be read"),
    (("--checkpoint", "/absent"), "no such folder"),
    (("--port", "99999"), "0 to 65535"),
  ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(options, words, capsys):
  assert cli.main(["serve", *options]) == 2
  (line,) = capsys.readouterr().err.splitlines()[-1:]
  assert words in line


@pytest.mark.slow
def test_a_second_signal_ends_at_once(folder, golden, clip):
  server = ServerProcess("--checkpoint", str(folder), "--media-root", str(golden / "media"), *SIZES)
  body = asking(clip, max_tokens=64, temperature=2.0)
  connections = [_send(server, json.dumps(body | {"seed": i}).encode()) for i in range(8)]
  _until(lambda: server.metric("vr_requests_running") > 0)
  server.signal()
  server.wait_for("(SIGTERM): answers under way")
  server.signal(signal.SIGINT)
  assert server.end(30) == 0
  for connection in connections:
    connection.close()


def test_on_sigterm_streams_end_whole(server, clip):
  """The last test of this server."""
  body = asking(clip, stream=True, max_tokens=64, temperature=1.0)
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    replies = [threads.submit(post, server, {**body, "seed": i}) for i in range(8)]
    levels = ("vr_requests_running", "vr_requests_waiting")
    # All have come: what comes to a server that ends is refused.
    _until(lambda: sum(map(server.metric, levels)) + sum(r.done() for r in replies) >= 8)
    server.signal()
    server.wait_for("(SIGTERM): answers under way")
    assert all(streamed(reply.result())[1] for reply in replies)
  assert server.end() == 0
