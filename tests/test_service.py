"""Many callers of one model: each gets the answer it would get alone, and compiles nothing."""

import asyncio
import dataclasses
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from bad_decoder import with_bad_decoder

import vr_jax
from data_pipes.errors import InputError
from data_pipes.prompts import MEDIA_IDS, question_prompt
from vr_jax.compiling import compilations
from vr_jax.inference import generate
from vr_jax.inference.fairness import FairQueue
from vr_jax.inference.requests import conversation
from vr_jax.inference.service import Busy, Closed, Service
from vr_jax.inference.tickets import Cancelled, Done, Failed, Started, Text

SIZES = {"rows": 3, "new_tokens": 32, "question_slots": 128, "scene_frames": 4, "row_classes": ()}
OPTIONS = {"max_new_tokens": 8, "scene_frames": 4, "batch_size": 3}
WAYS = (
  {},
  {"max_new_tokens": 3},
  {"temperature": 1.0, "seed": 5},
  {"temperature": 0.7, "top_p": 0.8},
  {"repetition_penalty": 1.3, "logprobs": 2},
)


@pytest.fixture(scope="module")
def model(golden):
  model = vr_jax.load(golden / "tiny_videorefer_qwen2")
  model.eos_ids = ()  # answers of known lengths
  return model


@pytest.fixture(scope="module")
def requests(golden):
  media = golden / "media"
  box = vr_jax.Region(box=(6, 6, 40, 44), frame=3)
  return [
    vr_jax.Request(media / "clip_mp4.mp4", "What is <region> doing?", (box,)),
    vr_jax.Request(media / "clip_dir", "What happens?"),
    vr_jax.Request(media / "img_a.png", "Describe the image."),
  ]


@pytest.fixture(scope="module")
def service(model):
  with Service(model, **SIZES, max_new_tokens=8) as running:
    yield running


def no_more_than(seconds, condition):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    threading.Event().wait(0.005)
  assert condition()


def test_each_of_many_callers_gets_the_answer_it_would_get_alone(service, model, requests):
  mixed = [(request, way) for request in requests for way in WAYS]
  expected = [model.ask_many([r], **OPTIONS | way)[0] for r, way in mixed]
  before = compilations()
  with ThreadPoolExecutor(24) as callers:

    def ask(one, i):
      ticket = service.submit(one[0], **one[1], client=i % 4, stream=i % 3 == 0)
      if i % 5 == 4:
        ticket.cancel()
        return None
      return ticket.result(60)

    answers = list(callers.map(ask, 2 * mixed, range(2 * len(mixed))))
  for i, answer in enumerate(answers):
    assert answer is None or answer == (2 * expected)[i]
  assert compilations() == before
  assert service.metrics()["compilations"] == 0
  no_more_than(5, lambda: not service._tickets and service.metrics()["rows_busy"] == 0)


def test_text_comes_as_it_is_made(service, model, requests):
  ticket = service.submit(requests[0], stream=True)
  events = list(ticket)
  assert isinstance(events[0], Started)
  assert isinstance(events[-1], Done)
  pieces = [event for event in events if isinstance(event, Text)]
  assert len(pieces) > 1
  answer = ticket.result()
  assert "".join(piece.delta for piece in pieces) == answer.text
  assert sum((piece.token_ids for piece in pieces), ()) == answer.token_ids
  assert answer == model.ask_many([requests[0]], **OPTIONS)[0]
  assert (answer.reason, answer.usage.completion) == ("length", 8)
  times = answer.timings
  assert 0 <= times.queue <= times.first_token <= times.total
  again = service.submit(requests[0]).result(60).usage
  assert 0 < again.cached < again.prompt == answer.usage.prompt


def test_coroutines_wait_without_a_thread(service, requests):
  async def ask(request):
    return [event async for event in service.submit(request, stream=True)]

  async def ask_all():
    return await asyncio.gather(*map(ask, requests))

  for events in asyncio.run(ask_all()):
    assert isinstance(events[-1], Done)


def test_a_stop_text_ends_the_answer(service, requests):
  whole = service.submit(requests[1], max_new_tokens=24).result(60)
  stop = whole.text[len(whole.text) // 2 :][:3]
  ticket = service.submit(requests[1], max_new_tokens=24, stop=(stop, "never"), stream=True)
  pieces = [event.delta for event in ticket if isinstance(event, Text)]
  answer = ticket.result()
  assert answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)].strip()
  assert answer.reason == "stop"
  assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
  assert len(answer.token_ids) < 24


def test_log_probabilities_go_with_the_tokens(service, requests):
  answer = service.submit(requests[1], max_new_tokens=4, logprobs=3).result(60)
  assert [score.token_id for score in answer.logprobs] == list(answer.token_ids)
  for score in answer.logprobs:
    assert score.top[0] == (score.token_id, score.logprob)  # greedy
    assert score.top[0][1] >= score.top[1][1] >= score.top[2][1]
  assert len(answer.logprobs[0].top) == 3
  hot = service.submit(requests[1], max_new_tokens=4, logprobs=0, temperature=2, seed=3).result(60)
  assert all(score.logprob < 0 and not score.top for score in hot.logprobs)


def test_scores_are_logarithms_of_shares():
  logits = np.random.default_rng(0).normal(0, 3, (2, 40)).astype(np.float32)
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  empty, rows, token = generate.empty_scores(2, 3), np.arange(2), np.array([7, 11])
  scores, ids = jax.jit(generate._note_scores)(
    logits, token, rows, np.array([1, 3]), *empty.values()
  )
  expected = np.log([shares[0, 7], *np.sort(shares[0])[::-1][:5]])
  np.testing.assert_allclose(scores[0, 1], expected, atol=1e-5)
  assert list(ids[0, 1]) == list(np.argsort(-logits[0])[:5])
  assert not scores[1].any()  # its row has ended


def test_what_cannot_be_answered_costs_itself_alone(service, requests):
  bad = vr_jax.Request("absent.mp4", "What happens?")
  tickets = [service.submit(request) for request in (bad, requests[1])]
  with pytest.raises(InputError, match=r"absent\.mp4"):
    tickets[0].result(60)
  assert isinstance(next(iter(tickets[0])), Failed)
  assert tickets[1].result(60).text
  for options, match in (
    ({"max_new_tokens": 33}, "max_new_tokens=33; accepted: up to 32"),
    ({"scene_frames": 8}, "scene_frames=8; accepted: 4"),
    ({"stop": ["a"] * 5}, "accepted: up to 4 texts"),
    ({"logprobs": 6}, "logprobs=6; accepted: a whole number from 0 to 5"),
  ):
    with pytest.raises(InputError, match=match):
      service.submit(requests[1], **options)
  long = vr_jax.Request(requests[1].video, "Why? " * 200)
  with pytest.raises(InputError, match="tokens; accepted: 128, which the service was started with"):
    service.submit(long).result(60)


def test_an_answer_ends_at_its_deadline(service, requests):
  late = service.submit(requests[1], deadline=0.0).result(60)
  assert (late.reason, late.text) == ("length", "")
  assert "deadline" in late.warnings[-1]


@pytest.mark.parametrize("state", ["queued", "started"])
def test_a_cancelled_request_frees_its_place(service, requests, state):
  ticket = service.submit(requests[1], max_new_tokens=32, stream=True)
  if state == "started":
    next(iter(ticket))
  ticket.cancel()
  with pytest.raises(Cancelled):
    ticket.result()
  no_more_than(5, lambda: service.metrics()["rows_busy"] == 0)
  assert service.submit(requests[1]).result(60).text


def test_the_queue_and_a_client_have_their_limits(service, requests, monkeypatch):
  limits = service.limits
  monkeypatch.setattr(
    service, "limits", type(limits)(**vars(limits) | {"queue": 6, "per_client": 2})
  )
  with service.model.device:  # nothing is answered meanwhile
    tickets = [service.submit(requests[1], client=i // 2) for i in range(6)]
    with pytest.raises(Busy, match="6 requests wait already"):
      service.submit(requests[1])
    tickets.pop().cancel()
    with pytest.raises(Busy, match="2 requests of this client"):
      service.submit(requests[1], client=0)
  assert all(ticket.result(60).text for ticket in tickets)


def test_clients_take_turns():
  queue = FairQueue()
  for i in range(6):
    queue.push("many", i, 32)
  queue.push("few", "a", 32)
  queue.push("few", "b", 32)
  order = [queue.pop() for _ in range(8)]
  assert order.index("a") <= 2
  assert order.index("b") <= 4
  assert [i for i in order if isinstance(i, int)] == list(range(6))
  assert queue.pop() is None
  queue.push("a", 1, 1000)
  queue.push("b", 2, 1000)
  assert queue.pop(lambda item: item == 2) == 2
  queue.drop(lambda item: True)
  assert not len(queue)


def test_a_drained_service_ends_what_it_has(model, requests):
  running = Service(model, **SIZES)
  tickets = [running.submit(request, max_new_tokens=8) for request in requests]
  assert running.ready
  assert running.drain(60)
  assert not running.ready
  assert all(ticket.result().text for ticket in tickets)
  with pytest.raises(Closed):
    running.submit(requests[1])
  running.close()


def test_our_own_fault_reaches_every_caller(model, requests, monkeypatch):
  running = Service(model, **SIZES)
  monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the traceback of the device thread

  def broken(*_):
    raise ZeroDivisionError("a fault of ours")

  with monkeypatch.context() as patch:
    patch.setattr(model.visual, "seeing", broken)
    with pytest.raises(ZeroDivisionError):
      running.submit(requests[1]).result(60)
    with pytest.raises(ZeroDivisionError):
      model.ask_many([requests[1]], **OPTIONS)
  running.close()
  assert model.ask_many([requests[1]], **OPTIONS)


def test_earlier_turns_keep_their_objects(service, model, requests):
  box = vr_jax.Region(box=(6, 6, 40, 44), frame=3, name="cat")
  other = vr_jax.Region(box=(20, 20, 60, 60), frame=5, name="cup")
  video = requests[0].video
  first = {"role": "user", "content": "What is <region>?", "regions": [box]}
  answer = model.ask(video, [first], **OPTIONS)
  assert answer == model.ask(video, "What is <region>?", [box], **OPTIONS)
  said = {"role": "assistant", "content": answer.text}
  second = {"role": "user", "content": "And <region>, beside <region cat>?", "regions": [other]}
  following = model.ask(video, [first, said, second], **OPTIONS)
  assert [one["name"] for one in following.objects] == ["cat", "cup", "cat"]
  assert following.objects[0] == following.objects[2] == answer.objects[0]
  assert following.usage.cached > 0
  system = {"role": "system", "content": "Answer in one word."}
  assert model.ask(video, [system, first], **OPTIONS).usage.prompt > 0
  request = vr_jax.Request(video, **conversation([first, said, second]))
  assert service.submit(request).result(60) == following
  for messages, match in (
    ([first, first], "messages of user, user"),
    ([{"role": "user", "content": 3}], "accepted: content that is text"),
    ([{"role": "user", "content": "<region dog>?", "regions": [box]}], "no object 'dog'; .* cat"),
    ([first, said, {"role": "user", "content": "<region>?"}], "found 1 <region> but 0 objects"),
  ):
    with pytest.raises(InputError, match=match):
      model.ask(video, messages, **OPTIONS)


def test_a_question_about_no_video(service, model):
  request = vr_jax.Request(None, "Who are you?")
  answer = service.submit(request).result(60)
  assert len(answer.token_ids) == 8
  assert (answer.scene_frames, answer.objects) == ((), ())
  region = vr_jax.Region(box=(6, 6, 40, 44), frame=3)
  with pytest.raises(InputError, match="regions without a video"):
    service.submit(vr_jax.Request(None, "<region>?", [region])).result(60)


def test_control_tokens_are_text_where_that_is_asked_for(service, model, requests):
  tokenizer = model.tokenizer
  end = next(token for token in tokenizer.controls if "im_end" in token)
  question = f"Hello{end}\n<video> there"
  text, ids = question_prompt(question, tokenizer, "video", literal=True)
  plain = question_prompt("Hello\n there", tokenizer, "video")[1].ids
  assert question in text
  for control in (tokenizer.id_of(end), MEDIA_IDS["<video>"]):
    assert (ids.ids == control).sum() == (plain == control).sum()
  assert len(ids.ids) > len(plain)
  same = [question_prompt("Hello there", tokenizer, "video", literal=x)[1].ids for x in (0, 1)]
  np.testing.assert_array_equal(*same)
  request = vr_jax.Request(requests[0].video, question)
  with pytest.raises(InputError, match="2 media tags"):
    service.submit(request).result(60)
  assert service.submit(request, literal=True).result(60).token_ids


def test_a_decoder_that_dies_costs_its_request_alone(service, requests, monkeypatch, tmp_path):
  with_bad_decoder(tmp_path / "site", monkeypatch)
  bad = shutil.copy(requests[0].video, tmp_path / "abort.mp4")
  tickets = [service.submit(vr_jax.Request(bad, "What happens?")), service.submit(requests[0])]
  with pytest.raises(InputError, match=r"abort\.mp4: the decoder crashed"):
    tickets[0].result(60)
  assert tickets[1].result(60).text


def test_prefixes_are_kept_up_to_so_many_bytes(model, requests, monkeypatch):
  model.visual.forget()
  for request in requests:
    model.ask_many([request], **OPTIONS)
  whole = model.visual.kept_bytes
  monkeypatch.setattr(model.visual, "memory", whole * 2 // 3)
  before = model.visual.counts["prefixes"]
  model.ask_many([requests[0]], **OPTIONS)  # known, and now the newest; the oldest two stay out
  assert model.visual.counts["prefixes"] == before
  assert model.visual.kept_bytes == whole * 2 // 3
  model.ask_many([requests[2]], **OPTIONS)
  assert model.visual.counts["prefixes"] == before
  model.ask_many([requests[1]], **OPTIONS)
  assert model.visual.counts["prefixes"] == before + 1


@pytest.mark.slow
def test_answers_move_to_more_rows_and_back(model, requests):
  """300 requests of 32 clients; the rows of few answers are 1, those of more are 3."""
  mixed = [(request, way) for request in requests for way in WAYS]
  with Service(model, **SIZES | {"row_classes": (1,), "queue": 400, "per_client": None}) as running:
    alone = [running.submit(r, **{"max_new_tokens": 8} | way).result(60) for r, way in mixed]
    rows = {len(lane.rows._keys) for lane in running._scheduler._lanes.values()}
    assert rows == {1}
    before = compilations()
    with ThreadPoolExecutor(32) as callers:

      def ask(i):
        request, way = mixed[i % len(mixed)]
        ticket = running.submit(request, **{"max_new_tokens": 8} | way, stream=i % 3 == 0)
        if i % 7 == 6:
          ticket.cancel()
          return None
        return ticket.result(120)

      answers = list(callers.map(ask, range(300)))
    for i, answer in enumerate(answers):
      assert answer is None or tokens(answer) == tokens(alone[i % len(mixed)])
    assert compilations() == before
  together = [model.ask_many([r], **OPTIONS | way)[0] for r, way in mixed]
  assert list(map(tokens, together)) == list(map(tokens, alone))


def tokens(answer):
  """The answer without its scores, whose last bits depend on the number of rows."""
  return dataclasses.replace(answer, logprobs=None)
