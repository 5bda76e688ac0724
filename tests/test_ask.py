"""Asking the tiny published checkpoint through Python and through the command line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import vr_jax
from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.commands import ask as ask_command
from vr_jax.inference.options import Options
from vr_jax.inference.reading import around_media
from vr_jax.inference.regions import objects_of
from vr_jax.inference.requests import Answer
from vr_jax.interop.convert import convert

QUESTION = "What is <region> doing?"


@pytest.fixture(scope="module")
def model(golden):
  return vr_jax.load(golden / "tiny_videorefer_qwen2")


@pytest.fixture
def clip(golden):
  return golden / "media" / "clip_mp4.mp4"


def box(frame=3, **fields):
  return vr_jax.Region(box=(10, 10, 60, 50), frame=frame, **fields)


def test_the_command_and_python_give_the_same_text(model, golden, clip, capsys):
  command = ["ask", "--checkpoint", str(golden / "tiny_videorefer_qwen2"), "--video", str(clip)]
  command += ["--region", "box:10,10,60,50@3", "--question", QUESTION, "--max-new-tokens", "12"]
  assert cli.main(command) == 0
  printed = capsys.readouterr().out
  answer = model.ask(clip, QUESTION, [box()], max_new_tokens=12)
  assert printed == answer.text + "\n"
  assert len(answer.token_ids) == 12
  assert cli.main([*command, "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["token_ids"] == list(answer.token_ids)


def test_answers_do_not_depend_on_the_batch(model, clip, golden):
  cat = [box(f, name="cat") for f in range(0, 12, 2)]
  requests = [
    vr_jax.Request(clip, QUESTION, [box()]),
    vr_jax.Request(
      golden / "media" / "clip_dir",
      "Compare <region> and <region>.",
      [vr_jax.Region(point=(20, 20), frame=0), box(5)],
    ),
    vr_jax.Request(clip, "What happens in the video, and to <region>?", cat),
    vr_jax.Request(clip, "What happens?"),
  ]
  together = model.ask_many(requests, max_new_tokens=10, batch_size=3)
  for request, answer in zip(requests, together, strict=True):
    alone = model.ask(request.video, request.question, request.regions, max_new_tokens=10)
    assert alone == answer


def likelihood_of_a_whole_pass(model, request, option):
  """Every token at once through the decoder, without any cache."""
  model.visual.forget()  # else its frames are not read again
  (group,) = model.reader(Options()).read([(0, request)])
  (question,) = group.questions
  head, tail = around_media(question.text)
  ids = np.concatenate([tail, model.tokenizer.encode(option)])

  def run(module):
    frames = np.stack([group.clip.frames[n] for n in group.clip.scene])
    scene = module.scene_tokens(module.encode_frames(frames[None]))[0]
    parts = [module.llm.embed(head[None])[0], scene]
    objects = iter(model._see(group, group.questions)[1])
    for i in ids:
      is_region = i == model.tokenizer.region_id
      parts.append(next(objects).tokens if is_region else module.llm.embed(i[None, None])[0])
    embeds = np.concatenate([np.asarray(p, np.float32) for p in parts])[None]
    hidden, _ = module.llm(embeds, np.arange(embeds.shape[1])[None])
    return module.llm.logits(hidden)[0]

  logits = nn.apply(run, model._module)({"params": model.params})
  count = len(model.tokenizer.encode(option))
  each = jax.nn.log_softmax(logits[-count - 1 : -1])[np.arange(count), ids[-count:]]
  return float(each.sum())


def test_choices_are_the_log_likelihoods_of_a_whole_pass(model, golden, clip):
  requests = [
    vr_jax.Request(clip, QUESTION, [box()]),
    vr_jax.Request(golden / "media" / "clip_dir", "What happens?"),
  ]
  options = [["(A)", "(B) it runs away from the red door"], ["Yes", "No"]]
  before = model.visual.counts["prefixes"]
  scores = model.choices(requests, options, batch_size=3)
  assert model.visual.counts["prefixes"] <= before + 2  # one a video, whatever is asked
  assert list(map(len, scores)) == [2, 2]
  for request, texts, values in zip(requests, options, scores, strict=True):
    for text, value in zip(texts, values, strict=True):
      expected = likelihood_of_a_whole_pass(model, request, text)
      assert value == pytest.approx(expected, abs=2e-4 * len(text))
  assert model.choices(requests[1:2], [["No", "Yes"]])[0] == pytest.approx(
    scores[1][1::-1], abs=1e-5
  )


def test_choices_refuse_what_they_cannot_score(model, clip):
  with pytest.raises(InputError, match="no options"):
    model.choices([vr_jax.Request(clip, "What?")], [[]])
  with pytest.raises(InputError, match="option '' has no tokens"):
    model.choices([vr_jax.Request(clip, "What?")], [["A", ""]])
  with pytest.raises(InputError, match="2 requests and 1 lists"):
    model.choices([vr_jax.Request(clip, "What?")] * 2, [["A"]])


def test_an_answer_names_the_frames_behind_each_object_token(model, clip):
  cat = [box(f, name="cat") for f in range(0, 24, 2)]
  answer = model.ask(clip, QUESTION, cat, max_new_tokens=1)
  (told,) = answer.objects
  assert told["name"] == "cat"
  assert 1 <= len(told["tokens"]) <= 4
  assert [f for token in told["tokens"] for f in token] == list(range(0, 24, 2))


def test_the_similarity_of_an_objects_frames(model, clip):
  cat = [box(f, name="cat") for f in range(0, 24, 2)]
  ((similarity, segments),) = model.object_similarity(vr_jax.Request(clip, QUESTION, cat))
  assert similarity.shape == (12, 12)
  np.testing.assert_allclose(np.diagonal(similarity), 1, atol=1e-5)
  np.testing.assert_allclose(similarity, similarity.T, atol=1e-6)
  (told,) = model.ask(clip, QUESTION, cat, max_new_tokens=1).objects
  assert [len(token) for token in told["tokens"]] == np.bincount(segments).tolist()


def test_sampling_is_a_function_of_the_seed(model, clip):
  def ask(seed):
    return model.ask(clip, QUESTION, [box()], max_new_tokens=16, temperature=1.0, seed=seed)

  assert ask(1) == ask(1)
  assert ask(1).token_ids != ask(2).token_ids


def test_images_and_arrays(model, golden):
  image = golden / "media" / "img_a.png"
  answer = model.ask(image, QUESTION, [vr_jax.Region(box=(5, 5, 30, 30))], max_new_tokens=4)
  assert len(answer.token_ids) == 4
  frames = np.stack([np.asarray(Image.open(image).convert("RGB"))] * 6)
  assert model.ask(frames, "What happens?", max_new_tokens=4, scene_frames=6).scene_frames == (
    0,
    1,
    2,
    3,
    4,
    5,
  )


def test_a_vanished_object_is_warned_of(model, clip):
  small = vr_jax.Region(box=(1, 1, 2, 2), frame=0)
  kept = model.ask(clip, QUESTION, [small], max_new_tokens=8)
  assert "too small" in kept.warnings[0]
  assert "stands for it" in kept.warnings[0]
  lost = model.ask(clip, QUESTION, [small], max_new_tokens=8, mask_rule="published")
  assert "learns nothing about it" in lost.warnings[0]
  assert lost.token_ids != kept.token_ids


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["--region", "box:10,10,60,50@300"], "frames 0 to"),
    (["--region", "box:10,10,60@3"], "box"),
    (["--region", "nothing.png@3"], "neither a file nor a region"),
    ([], "1 <region> but 0 objects"),
    (["--region", "box:1,1,60,50@3", "--region", "box:9,9,60,50@3"], "1 <region> but 2 objects"),
    (["--region", "box:10,10,60,50@3", "--top-p", "0"], "top_p"),
    (["--region", "box:10,10,60,50@3", "--scene-frames", "1"], "scene_frames"),
    (["--region", "box:10,10,60,50@3", "--max-new-tokens", "0"], "max_new_tokens"),
    (["--region", "box:10,10,60,50@3", "--mesh", "rows=2"], "accepted: data=N, tensor=N"),
    (["--region", "box:10,10,60,50@3", "--mesh", "data=99"], "here are 8"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, golden, clip, capsys):
  command = ["ask", "--checkpoint", str(golden / "tiny_videorefer_qwen2"), "--video", str(clip)]
  assert cli.main([*command, "--question", QUESTION, *arguments]) == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  assert printed.err.count("\n") == 1
  assert says in printed.err


@pytest.mark.parametrize("content", [b"", b"not a video"])
def test_an_unreadable_video_is_named(model, tmp_path, content):
  path = tmp_path / "broken.mp4"
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"broken\.mp4"):
    model.ask(path, "What happens?")


def test_times_in_a_folder_of_frames_go_by_fps(tmp_path, monkeypatch, capsys):
  for number in range(12):
    Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
  frames = []

  class Stub:
    def ask(self, video, question, regions, **options):
      frames.extend(objects_of(regions, video)[0].masks)
      assert video.fps == 3  # the published rule of the scene
      return Answer("It.", (), (), (), ())

  monkeypatch.setattr(ask_command, "load_model", lambda loading: Stub())
  command = ["ask", "--video", str(tmp_path), "--question", "<region>"]
  for region, fps, number in (("0.5s", ["--fps", "10"], 5), ("0:01", [], 3)):
    assert cli.main([*command, "--region", f"box:1,1,9,9@{region}", *fps]) == 0
    assert frames.pop() == number
  assert cli.main([*command, "--fps", "0"]) == 2
  assert "fps=0.0; accepted: a number above 0" in capsys.readouterr().err
  assert cli.main(["ask", "--jsonl", "r.jsonl", "--out", "a.jsonl", "--fps", "3"]) == 2
  assert "without --video, --region, --fps" in capsys.readouterr().err


def test_a_checkpoint_that_is_none(tmp_path, capsys):
  command = ["ask", "--video", "x.mp4", "--question", "What?", "--checkpoint"]
  assert cli.main([*command, str(tmp_path / "absent")]) == 2
  assert "vr-mini" in capsys.readouterr().err
  assert cli.main([*command, str(tmp_path)]) == 2
  assert str(tmp_path) in capsys.readouterr().err


@pytest.fixture(scope="module")
def convert_quietly(golden):
  def run(dst, to):
    source = golden / "tiny_videorefer_qwen2"
    convert(source, dst, to, logits="never", report=lambda line: None)
    return dst

  return run


@pytest.mark.parametrize("to", ["vr", "torch"])
def test_every_folder_with_a_whole_model_gives_the_same_answer(
  to, convert_quietly, model, clip, tmp_path
):
  converted = vr_jax.load(convert_quietly(tmp_path / "out", to))
  assert converted.cfg == dataclasses.replace(model.cfg, name=converted.cfg.name)
  one, other = (m.ask(clip, QUESTION, [box()], max_new_tokens=16) for m in (model, converted))
  assert (one.text, one.token_ids) == (other.text, other.token_ids)


def test_weights_that_are_no_whole_model_are_refused(convert_quietly, golden, tmp_path):
  tower = golden / "tiny_videorefer_qwen2" / "siglip_vision_tower"
  with pytest.raises(InputError, match="holds img and no connector, region, llm: not a whole"):
    vr_jax.load(tower)
  with pytest.raises(InputError, match=r"big_vision npz without tokenizer files; accepted: a work"):
    vr_jax.load(convert_quietly(tmp_path / "out.npz", "big_vision"))


def test_a_truncated_published_checkpoint_is_named(golden, tmp_path):
  broken = tmp_path / "broken"
  broken.mkdir()
  source = golden / "tiny_videorefer_qwen2"
  for path in source.iterdir():
    if path.is_file():
      data = path.read_bytes()
      cut = path.suffix == ".safetensors"
      (broken / path.name).write_bytes(data[: len(data) // 2] if cut else data)
  (broken / "siglip_vision_tower").symlink_to(source / "siglip_vision_tower")
  with pytest.raises(InputError, match=r"model\.safetensors"):
    vr_jax.load(broken)
