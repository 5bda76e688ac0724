"""The embedded set: the world, its files, and questions that give nothing away."""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise

import av
import numpy as np
import pytest

from data_pipes.embedded.captions import detailed_caption, motion
from data_pipes.embedded.dialogues import question_dialogue
from data_pipes.embedded.make_set import make_set
from data_pipes.embedded.questions import LETTERS, MOTIONS, TYPES, Balance, Choice, candidates
from data_pipes.embedded.render import render
from data_pipes.embedded.scenes import FRAMES, HEIGHT, RELATIONS, WIDTH, make_scene
from data_pipes.embedded.states import SLICES, in_picture, thing_states
from data_pipes.embedded.stills import THINGS, picture_rows
from data_pipes.frame_rules import grid_frames
from data_pipes.masks import segmentation_to_mask
from data_pipes.records import RecordFile
from vr_jax.evaluation.answers import grade


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
  return make_set(tmp_path_factory.mktemp("set"), 4, 6, 20, dialogues=2)


@pytest.fixture(scope="module")
def choices() -> list[Choice]:
  balance, made = Balance(3), []
  for seed in range(2400):
    found = candidates(make_scene(seed))
    for kind in TYPES:
      question = balance.pick(found, kind)
      if question:
        made.append(balance.choose(question))
  return made


def test_scenes_are_a_function_of_the_seed():
  a, b, other = make_scene(5), make_scene(5), make_scene(6)
  np.testing.assert_array_equal(render(a)[0], render(b)[0])
  assert detailed_caption(a, 0) == detailed_caption(b, 0)
  assert [t.full_name for t in a.things] != [t.full_name for t in other.things]


def test_tracks_follow_the_script():
  for seed in range(60):
    for thing in make_scene(seed).things:
      path = np.diff(thing.centres, axis=0)
      step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
      for name, moved in ((thing.steps[0], path[0]), (thing.steps[-1], path[-1])):
        np.testing.assert_array_equal(np.sign(np.round(moved, 2)), step[name.split()[-1]])
      assert motion(thing.steps) in MOTIONS


def test_a_scene_is_drawn_at_any_scale():
  scene = make_scene(5)
  (frames, masks), (larger, over) = render(scene), render(scene, 2)
  assert larger.shape == (FRAMES, 2 * HEIGHT, 2 * WIDTH, 3)
  halved = larger.reshape(FRAMES, HEIGHT, 2, WIDTH, 2, 3).mean((2, 4))
  assert np.abs(halved - frames).mean() < 6  # grain and noise are drawn anew
  np.testing.assert_allclose(over.sum((1, 2, 3)) / masks.sum((1, 2, 3)), 4, rtol=0.15)
  striped = dataclasses.replace(scene, things=[dataclasses.replace(t) for t in scene.things])
  for thing in striped.things:
    thing.texture = "striped"
  fine, coarse = (render(striped, 1, marking)[0].astype(int) for marking in (1.0, 3.0))
  changes = [np.abs(np.diff(drawn[0], axis=1)).sum() for drawn in (fine, coarse)]
  assert changes[0] > 1.1 * changes[1]  # more edges


def test_every_relation_occurs_and_occlusion_is_real():
  scenes = [make_scene(seed) for seed in range(80)]
  assert {s.relation for s in scenes} == set(RELATIONS)
  scene = next(s for s in scenes if s.relation == "passes behind it")
  _, masks = render(scene)
  areas = masks[scene.actor].sum((1, 2))
  assert areas.min() < 0.6 * areas.max()  # partly hidden for a while
  assert not (masks[scene.actor] & masks[scene.target]).any()  # visible parts are disjoint


def test_states_describe_what_is_seen():
  scene = make_scene(11)
  states, present = thing_states(scene), in_picture(scene)
  assert states.shape[:2] == (len(scene.things), FRAMES)
  assert not states[~present].any()
  centres = np.stack([t.centres for t in scene.things])
  columns = (np.arange(8) + 0.5) / 8
  inner = present & (np.abs(centres[..., 0] / WIDTH - 0.5) < 0.4)
  at = (states[..., SLICES["column"]] * columns).sum(-1)
  np.testing.assert_allclose(at[inner], centres[..., 0][inner] / WIDTH, atol=0.02)


def test_pictures_for_the_tower():
  rows = picture_rows(3, 96, 12)
  assert rows["frames"].shape == (FRAMES, 96, 96, 3)
  assert rows["masks"].shape == (FRAMES, THINGS, 144)
  assert rows["masks"].any(-1).mean() > 0.8


def test_files_are_in_the_published_format(small_set):
  for name, regions in (
    ("scene_captions", False),
    ("short_captions", True),
    ("detailed_captions", True),
    ("qa", True),
  ):
    records = RecordFile(small_set / f"{name}.json")
    assert len(records) == (8 if name == "qa" else 4)
    for i in range(len(records)):
      record = records[i]  # parsing is strict: keys, tags and counts of <region>
      assert bool(record.objects) == regions
      assert (small_set / record.path).is_file()
      for frames in record.objects:
        assert list(frames) == list(dict.fromkeys(int(n) for n in grid_frames(FRAMES)))


def test_videos_are_h264_and_masks_fit(small_set):
  item = RecordFile(small_set / "short_captions.json")[0]
  with av.open(str(small_set / item.path)) as container:
    stream = container.streams.video[0]
    assert stream.codec_context.name == "h264"
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
  assert np.shape(frames) == (FRAMES, HEIGHT, WIDTH, 3)
  seed = int(re.search(r"\d+", item.path)[0])
  drawn, masks = render(make_scene(seed))
  assert np.abs(np.float32(frames) - drawn).mean() < 4  # H.264 loses little
  areas = {int(m[n].sum()) for m in masks for n in item.objects[0]}
  for segmentation in item.objects[0].values():
    if segmentation is not None:
      assert int(segmentation_to_mask(segmentation, HEIGHT, WIDTH).sum()) in areas


def test_bench_files_have_the_published_keys(small_set):
  questions = json.loads((small_set / "bench_q.json").read_text())
  keys = ["id", "video", "Question", "type", "options", "Answer", "frame_idx", "annotation"]
  assert [list(q) for q in questions] == [keys] * 20
  assert {q["type"] for q in questions} == set(TYPES)
  for q in questions:
    assert [o[:4] for o in q["options"]] == ["(A) ", "(B) ", "(C) ", "(D) "]
    assert len(set(q["options"])) == 4
    assert q["Answer"] in q["options"]
    assert q["Question"].count("<region>") == len(q["annotation"])
    assert all(a[q["frame_idx"]]["segmentation"] for a in q["annotation"])
  captions = json.loads((small_set / "bench_d.json").read_text())
  assert list(captions[0]) == ["id", "video", "caption", "frame_idx", "annotation"]


def test_training_and_held_out_videos_are_apart(small_set):
  trained = {RecordFile(small_set / "qa.json")[i].path for i in range(8)}
  asked = {q["video"] for q in json.loads((small_set / "bench_q.json").read_text())}
  assert trained
  assert not trained & asked


def test_a_complete_set_is_left_alone(small_set):
  before = (small_set / "qa.json").stat().st_mtime_ns
  make_set(small_set, 4, 6, 20, dialogues=2)
  assert (small_set / "qa.json").stat().st_mtime_ns == before


def test_letters_are_balanced(choices):
  for kind in TYPES:
    counts = Counter(c.letter for c in choices if c.question.kind == kind)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(LETTERS)


def scores_by_text(kind_of_baseline: str, train: list[Choice]):
  """Scores of (choice, content) that a reader of the text alone could learn from a set."""
  right: Counter = Counter()
  offered: Counter = Counter()
  for c in train:
    for content in c.contents:
      for other in c.contents if kind_of_baseline == "pairs" else (None,):
        key = (c.question.text, content, other)
        offered[key] += 1
        right[key] += content == c.question.answer

  def score(c: Choice, content: str) -> float:
    if kind_of_baseline == "overlap":
      words = [set(o.split()) for o in c.contents if o != content]
      return sum(len(set(content.split()) & w) for w in words)
    others = c.contents if kind_of_baseline == "pairs" else (None,)
    keys = [(c.question.text, content, other) for other in others]
    return sum(np.log((right[k] + 1) / (offered[k] + 4)) for k in keys)

  return score


@pytest.mark.parametrize("baseline", ["wording", "pairs", "overlap"])
def test_text_alone_does_not_answer(choices, baseline):
  half = len(choices) // 2
  score = scores_by_text(baseline, choices[:half])
  hits = defaultdict(list)
  for c in choices[half:]:
    best = max(c.contents, key=lambda content: score(c, content))
    hits[c.question.kind].append(best == c.question.answer)
  shares = {kind: round(float(np.mean(h)), 3) for kind, h in hits.items()}
  assert all(share <= 0.30 for share in shares.values()), shares


def test_answers_say_the_words_of_an_option():
  balance, rng = Balance(0), np.random.default_rng(0)
  for seed in range(20):
    d = question_dialogue(make_scene(seed), balance, rng)
    assert d.turns[0].text.startswith("<video>\n")
    assert sum(t.text.count("<region>") for t in d.turns) == len(d.things)
    for asked, said in list(pairwise(d.turns))[::2]:
      if "(A)" in asked.text:
        options = re.findall(r"\([A-D]\) .*?(?= \(|\. Answer)", asked.text)
        assert grade(said.text, said.text, options).correct
