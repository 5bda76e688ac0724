"""Many callers of one model: each gets the answer it would get alone, and compiles nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import vr_jax
from data_pipes.errors import InputError
from vr_jax.compiling import compilations
from vr_jax.inference import service as service_module
from vr_jax.inference.service import Busy, Closed, Service

OPTIONS = {"max_new_tokens": 8, "scene_frames": 4, "batch_size": 3}
WAYS = (
  {},
  {"max_new_tokens": 3},
  {"temperature": 1.0, "seed": 5},
  {"temperature": 0.7, "top_p": 0.8},
)


@pytest.fixture(scope="module")
def model(golden):
  return vr_jax.load(golden / "tiny_videorefer_qwen2")


@pytest.fixture(scope="module")
def requests(golden):
  media = golden / "media"
  box = vr_jax.Region(box=(6, 6, 40, 44), frame=3)
  return [
    vr_jax.Request(media / "clip_mp4.mp4", "What is <region> doing?", (box,)),
    vr_jax.Request(media / "clip_dir", "What happens?"),
    vr_jax.Request(media / "img_a.png", "Describe the image."),
  ]


@pytest.fixture
def service(model):
  with Service(model, **OPTIONS) as running:
    yield running


def test_each_of_many_callers_gets_the_answer_it_would_get_alone(service, model, requests):
  mixed = [(request, way) for request in requests for way in WAYS]
  expected = [model.ask(r.video, r.question, r.regions, **OPTIONS | way) for r, way in mixed]
  before = compilations()
  with ThreadPoolExecutor(24) as callers:
    answers = list(callers.map(lambda one: service.submit(one[0], **one[1]).result(60), 2 * mixed))
  assert answers == 2 * expected
  assert compilations() == before
  assert not service._tickets


def test_text_comes_as_it_is_made(service, model, requests):
  ticket = service.submit(requests[0])
  pieces = list(ticket)
  assert "".join(pieces) == ticket.result().text
  assert ticket.result() == model.ask_many([requests[0]], **OPTIONS)[0]


def test_what_cannot_be_answered_costs_itself_alone(service, requests):
  bad = vr_jax.Request("absent.mp4", "What happens?")
  tickets = [service.submit(request) for request in (bad, requests[1])]
  with pytest.raises(InputError, match=r"absent\.mp4"):
    tickets[0].result(60)
  assert tickets[1].result(60).text
  with pytest.raises(InputError, match="max_new_tokens=9; accepted: up to 8"):
    service.submit(requests[1], max_new_tokens=9)
  with pytest.raises(InputError, match="scene_frames is set when the service starts"):
    service.submit(requests[1], scene_frames=8)


def test_a_cancelled_request_makes_room(model, requests, monkeypatch):
  """Its row is freed in the midst of its answer, and a queue that was full takes the next."""
  model_eos, model.eos_ids = model.eos_ids, ()
  try:
    with Service(model, waiting=1, max_new_tokens=512, batch_size=1, scene_frames=4) as running:
      ticket = running.submit(requests[1])
      next(iter(ticket))  # it is being answered
      with pytest.raises(Busy, match="1 requests wait already"):
        running.submit(requests[1])
      ticket.cancel()
      with pytest.raises(InputError, match="cancelled"):
        ticket.result()
      monkeypatch.setattr(service_module, "IDLE_SECONDS", 0.01)
      for _ in range(1000):
        try:
          following = running.submit(requests[1], max_new_tokens=2)
          break
        except Busy:
          threading.Event().wait(0.01)
      assert len(following.result(60).token_ids) == 2
  finally:
    model.eos_ids = model_eos
  with pytest.raises(Closed):
    running.submit(requests[1])


def test_our_own_fault_reaches_every_caller(model, requests, monkeypatch):
  running = Service(model, **OPTIONS)
  monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the traceback of the device thread

  def broken(*_):
    raise ZeroDivisionError("a fault of ours")

  monkeypatch.setattr(model.visual, "see", broken)
  with pytest.raises(ZeroDivisionError):
    running.submit(requests[1]).result(60)
  running.close()
