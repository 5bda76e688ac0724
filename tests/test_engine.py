"""Sharing, batching, compiling, refusing: many requests to the tiny published checkpoint."""

import dataclasses
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import vr_jax
from data_pipes.errors import InputError
from data_pipes.video import Video, open_video, sample_scene, scene_ids
from vr_jax.compiling import compilations
from vr_jax.inference.placement import parse_mesh
from vr_jax.inference.programs import Programs
from vr_jax.inference.reading import Reader
from vr_jax.sharding import make_mesh

OPTIONS = {"max_new_tokens": 8, "scene_frames": 4}


@pytest.fixture(scope="module")
def tiny(golden):
  return golden / "tiny_videorefer_qwen2"


@pytest.fixture(scope="module")
def model(tiny):
  return vr_jax.load(tiny)


@pytest.fixture(scope="module")
def requests(golden):
  """Eight questions on four media, of different lengths, with none to two objects on 1-6 frames."""
  media = golden / "media"

  def box(frame, name=None):
    return vr_jax.Region(box=(6, 6, 40 + 2 * frame, 44), frame=frame, name=name)

  def ask(media_name, question, *regions):
    return vr_jax.Request(media / media_name, question, regions)

  return [
    ask("clip_mp4.mp4", "What is <region> doing?", box(3)),
    ask("clip_dir", "Compare <region> with <region>.", box(0), box(5)),
    ask("clip_mp4.mp4", "Is <region> at rest? " + "Answer yes or no. " * 9, box(9)),
    ask("img_a.png", "Describe <region>.", vr_jax.Region(box=(5, 5, 30, 30))),
    ask("clip_mp4.mp4", "Follow <region>.", *(box(f, "cat") for f in range(0, 12, 2))),
    ask("clip_gif.gif", "What happens?"),
    ask("clip_mp4.mp4", "What happens?"),
    ask("clip_dir", "Where is <region>?", box(7)),
  ]


@pytest.fixture(scope="module")
def answers(model, requests):
  return model.ask_many(requests, **OPTIONS)


@pytest.fixture
def ends(model, answers, monkeypatch):
  """The model with an end token that it does say, so that answers differ in length."""
  said = [answer.token_ids[3] for answer in answers[::2]]
  monkeypatch.setattr(model, "eos_ids", tuple(said))
  monkeypatch.setattr(model, "_engines", {})
  return model


def ids(answers):
  return [answer.token_ids for answer in answers]


def test_sharing_changes_the_work_and_not_the_answers(model, requests, answers):
  model.visual.forget()
  assert model.ask_many(requests, **OPTIONS) == answers
  shared = dict(model.visual.counts)
  model.visual.counts.clear()
  assert model.ask_many(requests, share=False, **OPTIONS) == answers
  apart = dict(model.visual.counts)
  assert (shared["prefixes"], apart["prefixes"]) == (4, 8)
  # On the film: 4 scene frames and masks on 0, 2, 3, 4, 6, 8, 9, 10, some of them in the scene.
  assert shared["frames"] < 0.6 * apart["frames"]
  assert shared["objects"] == apart["objects"] == 7


def test_the_same_frames_are_the_same_video_whatever_holds_them(model, monkeypatch):
  videos = np.random.default_rng(0).integers(0, 256, (2, 4, 20, 20, 3), np.uint8)
  read = []
  kept = Reader.read
  monkeypatch.setattr(Reader, "read", lambda self, part: read.append(part) or kept(self, part))
  model.visual.forget()
  apart = [vr_jax.Request(videos[i % 2], "What happens?") for i in range(4)]
  wanted = model.ask_many(apart, share=False, **OPTIONS)
  assert (model.visual.counts["prefixes"], len(read)) == (4, 4)
  model.visual.forget()
  assert model.ask_many(apart, **OPTIONS) == wanted  # views of one memory are read once
  assert (model.visual.counts["prefixes"], len(read)) == (2, 6)
  copies = [vr_jax.Request(list(r.video), r.question) for r in apart]
  assert model.ask_many(copies, **OPTIONS) == wanted  # in a later call, from a list
  assert (model.visual.counts["prefixes"], len(read)) == (2, 10)
  changed = videos[0].copy()
  changed[0] = 0
  model.ask(changed, "What happens?", **OPTIONS)
  assert model.visual.counts["prefixes"] == 3


def test_long_and_short_questions_share_the_frames_of_their_video(tiny, requests, golden):
  """Rows of two sizes, more videos than prefixes are kept: each frame is encoded once."""
  model, rng = vr_jax.load(tiny), np.random.default_rng(0)
  videos = rng.integers(0, 256, (20, 4, 20, 20, 3), np.uint8)
  mixed = [
    vr_jax.Request(video, "Where is <region>? " + "Look well. " * (60 * (i % 2)), [region])
    for i in range(2)
    for video in videos
    for region in [vr_jax.Region(box=(2, 2, 9, 9), frame=1)]
  ]
  shuffled = rng.permutation(len(mixed))
  answers = dict(model.answer_each({int(i): mixed[i] for i in shuffled}, **OPTIONS))
  assert len(model._engines) == 2
  assert model.visual.counts == {"frames": 80, "prefixes": 20, "objects": 40}
  for i in (0, 19, 20, 39):
    assert answers[i] == model.ask_many([mixed[i]], **OPTIONS)[0]


def test_a_request_for_a_part_of_a_video(model, requests):
  film = requests[0].video
  whole = vr_jax.Request(film, "What happens?")
  part = dataclasses.replace(whole, seconds=(0.2, 0.7))
  frames = sample_scene(open_video(film), 4, 0.2, 0.7)
  first, second, third = model.ask_many(
    [whole, part, vr_jax.Request(frames, "What happens?")], **OPTIONS
  )
  assert second.token_ids == third.token_ids
  assert second.scene_frames == tuple(scene_ids(open_video(film), 4, 0.2, 0.7))
  assert second.scene_frames != first.scene_frames
  for video, seconds, says in (
    (film, (60, 61), "no frame lies between 60 s and 61 s"),
    (requests[3].video, (0, 1), "an image has no times"),
    (frames, (0, 1), "has no times"),
  ):
    with pytest.raises(InputError, match=says):
      model.ask_many([vr_jax.Request(video, "What happens?", seconds=seconds)], **OPTIONS)
  with pytest.raises(InputError, match=r"seconds=\(1,\); accepted: two numbers"):
    vr_jax.Request(film, "What happens?", seconds=(1,))


def test_a_further_question_about_a_file_decodes_nothing_that_is_known(
  model, requests, answers, tmp_path, monkeypatch
):
  film = shutil.copy(requests[0].video, tmp_path)
  first, plain = (dataclasses.replace(requests[i], video=film) for i in (0, 6))
  decoded = []
  frames = Video.frames

  def counted(video, numbers, *rest):
    decoded.append(list(numbers))
    return frames(video, decoded[-1], *rest)

  monkeypatch.setattr(Video, "frames", counted)
  model.visual.forget()
  assert model.ask_many([first], **OPTIONS)[0] == answers[0]
  before = dict(model.visual.counts)
  decoded.clear()
  assert model.ask_many([first, plain], **OPTIONS) == [answers[0], answers[6]]
  assert decoded == []
  assert model.visual.counts == before
  region = vr_jax.Region(box=(2, 2, 30, 30), frame=7)
  other = dataclasses.replace(first, regions=[region])
  answer = model.ask_many([other], **OPTIONS)[0]
  assert decoded == [[7]]
  assert model.visual.counts["frames"] == before["frames"] + 1
  os.utime(film, (1, 1))  # another file, for all one can tell
  assert model.ask_many([other], **OPTIONS)[0] == answer
  assert len(decoded) == 2
  assert model.ask_many([other], share=False, **OPTIONS)[0] == answer


def test_a_prefix_is_kept_for_the_next_call(model, requests, answers):
  model.visual.forget()
  first = model.ask_many([requests[0]], **OPTIONS)
  second = model.ask_many([requests[6]], **OPTIONS)
  assert ids(first + second) == [answers[0].token_ids, answers[6].token_ids]
  assert model.visual.counts["prefixes"] == 1


def test_rows_are_refilled_as_answers_end(ends, requests):
  together = ends.ask_many(requests, batch_size=3, **OPTIONS)
  lengths = [len(answer.token_ids) for answer in together]
  assert len(set(lengths)) > 1
  assert lengths[0] <= 4
  assert ids(ends.ask_many(requests[::-1], batch_size=3, **OPTIONS)) == ids(together)[::-1]
  assert ids(ends.ask_many(requests, batch_size=3, share=False, **OPTIONS)) == ids(together)
  alone = [ends.ask_many([request], batch_size=3, **OPTIONS)[0] for request in requests]
  assert alone == together


def test_answers_come_as_they_are_done(ends, requests, answers):
  found = dict(ends.answer_each(requests, batch_size=2, **OPTIONS))
  assert sorted(found) == list(range(8))
  assert list(found) != sorted(found)
  assert [found[i] for i in range(8)] == ends.ask_many(requests, batch_size=3, **OPTIONS)


@pytest.mark.slow  # test_service counts compilations
def test_nothing_is_compiled_after_the_warm_up(tiny, requests):
  model = vr_jax.load(tiny)
  options = {"batch_size": 4, **OPTIONS}
  model.warm_up(question_slots=500, **options)
  rng = np.random.default_rng(0)
  picked = [requests[i] for i in rng.integers(0, len(requests), 192)]
  picked += [
    dataclasses.replace(requests[0], question="What is <region>? " + "Why so? " * int(n))
    for n in rng.integers(1, 60, 8)
  ]
  before = compilations()
  said = list(model.answer_each(picked, **options))
  assert not [answer for _, answer in said if isinstance(answer, InputError)]
  assert len(said) == 200
  for way in (
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1, "top_p": 0.5},
  ):
    assert model.ask_many(picked[:4], **options, **way)
  assert model.ask_many(picked[:2], **(options | {"max_new_tokens": 5}))
  assert compilations() == before
  model.ask_many(requests[:1], **(options | {"scene_frames": 6}))
  assert compilations() > before  # so the counter counts


def test_threads_that_meet_a_cold_program_compile_it_once():
  programs, barrier = Programs(), threading.Barrier(6)

  def ask(_):
    barrier.wait()
    return programs("square", lambda x: x @ x, np.ones((37, 37)))

  before = compilations()
  with ThreadPoolExecutor(6) as threads:
    compiled = list(threads.map(ask, range(6)))
  assert compilations() == before + 1
  assert len(set(map(id, compiled))) == 1


def test_text_streams_as_it_comes(model, requests, answers):
  asked = (requests[0].video, requests[0].question, requests[0].regions)
  pieces = []
  answer = model.ask(*asked, on_text=pieces.append, **OPTIONS)
  assert answer == answers[0]
  assert "".join(pieces) == answer.text
  assert len(pieces) > 1
  assert "".join(model.stream(*asked, every=1, **OPTIONS)) == answer.text


def test_a_bad_request_spoils_no_other(model, requests, answers):
  film = requests[0].video
  bad = [
    vr_jax.Request("nowhere.mp4", "What happens?"),
    vr_jax.Request(film, "<region>?", [vr_jax.Region(box=(1, 1, 9, 9), frame=999)]),
    vr_jax.Request(film, "<region>?", annotation=[{999: None}]),
    vr_jax.Request(film, "<region> and <region>?", requests[0].regions),
    vr_jax.Request(film, "A <video> in the question?"),
    vr_jax.Request([np.zeros((8, 8, 3), np.float32)], "Are these pixels?"),
  ]
  mixed = [bad[0], requests[0], *bad[1:4], requests[6], *bad[4:]]
  results = dict(model.answer_each(mixed, **OPTIONS))
  assert (results[1], results[5]) == (answers[0], answers[6])
  says = ["nowhere.mp4", None, "999", "999", "2 <region> but 1", None, "2 media tags", "float32"]
  for i, text in enumerate(says):
    if text is not None:
      assert isinstance(results[i], InputError)
      assert text in str(results[i])
  with pytest.raises(InputError, match=r"nowhere\.mp4"):
    model.ask_many(mixed[:2], **OPTIONS)


def test_frames_in_memory_have_the_scene_of_a_video(model, requests):
  frames = open_video(requests[0].video).frames(range(len(open_video(requests[0].video))))
  answer = model.ask(np.stack(frames), "What happens?", **OPTIONS)
  assert (
    answer.scene_frames == model.ask(requests[0].video, "What happens?", **OPTIONS).scene_frames
  )
  assert len(frames) > len(answer.scene_frames) == OPTIONS["scene_frames"]


def test_what_does_not_fit_is_refused_with_the_numbers(tiny, requests, answers):
  roomy = vr_jax.load(tiny)
  roomy.warm_up(**OPTIONS)
  (engine,) = roomy._engines.values()
  model = vr_jax.load(tiny, memory_limit=engine.plan.total)
  long = dataclasses.replace(requests[0], question="What is <region>? " + "And why? " * 600)
  results = dict(model.answer_each([long, requests[0]], **OPTIONS))
  assert results[1] == answers[0]
  assert "question 8192" in str(results[0])
  assert str(results[0]).count("MiB") >= 5
  with pytest.raises(InputError, match="do not fit the memory: weights"):
    model.ask_many(requests[:1], batch_size=64, **OPTIONS)


def test_sampling_does_not_depend_on_the_company(model, requests):
  hot = {"temperature": 1.0, "seed": 5, **OPTIONS}
  said = model.ask_many(requests, **hot)
  assert ids(model.ask_many(requests[:3], **hot)) == ids(said[:3])
  assert dict(model.answer_each({6: requests[6]}, **hot)) == {6: said[6]}
  assert ids(model.ask_many(requests, **(hot | {"seed": 6}))) != ids(said)


@pytest.mark.slow  # eight simulated devices on few cores, see test_meshes.py
def test_a_mesh_gives_the_same_answers(tiny, requests, answers):
  model = vr_jax.load(tiny, mesh=make_mesh([("data", 4), ("tensor", 2)]))
  w = model.params["llm"]["layers_0"]["attn"]["qkv"]["w"]
  assert w.sharding.shard_shape(w.shape)[1] == w.shape[1] // 2
  assert ids(model.ask_many(requests, **OPTIONS)) == ids(answers)


def test_a_mesh_by_name():
  assert dict(parse_mesh("data=2,tensor=4").shape) == {"data": 2, "tensor": 4}
  assert parse_mesh("tensor=2").devices.size == 2
  for text in ("", "tensor", "tensor=0", "data=2,data=2", "fsdp=2", "tensor=16"):
    with pytest.raises(InputError, match="--mesh"):
      parse_mesh(text)


def test_a_mesh_that_does_not_divide_the_heads(tiny):
  with pytest.raises(InputError, match="tensor=4: the decoder has 4 heads, 2 key heads"):
    vr_jax.load(tiny, mesh=make_mesh([("tensor", 4)], jax.devices()[:4]))
  with pytest.raises(InputError, match="mesh axes fsdp"):
    vr_jax.load(tiny, mesh=make_mesh([("fsdp", 2)], jax.devices()[:2]))


@pytest.mark.slow  # test_opening compares the arrays
def test_weights_by_name(tiny, requests):
  half = vr_jax.load(tiny, weights="bfloat16")
  assert half.params["llm"]["layers_0"]["mlp"]["gate_up"].dtype == "bfloat16"
  assert (
    half.params["img"]["Transformer"]["encoder_norm"]["scale"].dtype == "float32"
    if ("encoder_norm" in half.params["img"]["Transformer"])
    else True
  )
  assert len(half.ask_many(requests[:1], **OPTIONS)[0].token_ids) == 8
  with pytest.raises(InputError, match="weights='int3'; accepted: float32, bfloat16, int8"):
    vr_jax.load(tiny, weights="int3")


def test_programs_are_kept_on_disk(programs_on_disk, model, answers):
  assert len(list(programs_on_disk.iterdir())) >= 5


@pytest.mark.int8
def test_int8_weights_are_close(tiny, model, requests):
  """Half the layers' bytes and less, and nearly the same scores (qwix)."""
  from vr_jax.inference.programs import bytes_of

  small = vr_jax.load(tiny, weights="int8")
  layers = [bytes_of(m.params["llm"]["layers_0"]) for m in (small, model)]
  assert layers[0] < 0.3 * layers[1]
  assert len(small.ask_many(requests, **OPTIONS)) == 8
  tokens = np.random.default_rng(0).integers(0, 1000, (2, 30))

  def scores(m):
    def run(module, tokens):
      positions = np.tile(np.arange(30), (2, 1))
      return module.logits(module.llm(module.llm.embed(tokens), positions)[0])

    return np.asarray(m._module.apply({"params": m.params}, tokens, method=run))

  exact, rough = scores(model), scores(small)
  assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()
  assert (exact.argmax(-1) == rough.argmax(-1)).mean() > 0.8
