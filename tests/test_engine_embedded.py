"""The whole engine with its embedded agents: on the embedded set, and on videos with traps."""

import json
import math
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipes.embedded.captions import scene_caption
from data_pipes.embedded.make_set import make_set
from data_pipes.embedded.render import render, write_video
from data_pipes.embedded.scenes import make_scene
from data_pipes.engine import command, stages
from data_pipes.engine.agents.ingest import content_hash, survey_duplicates, write_clip
from data_pipes.engine.backends.builtin import AttributeJudge, NounPhrases, measure_object
from data_pipes.engine.export import file_paths
from data_pipes.engine.pipeline import run_stages
from data_pipes.engine.quality import duplicates, masks, text
from data_pipes.engine.quality.colours import NAMES, name_pixels
from data_pipes.engine.quality.shots import find_shots, perceptual_hash
from data_pipes.engine.roles import Claim, Clip, Context, backend_class
from data_pipes.engine.store import Store, manifest
from data_pipes.errors import InputError
from data_pipes.frame_rules import grid_frames
from data_pipes.masks import segmentation_to_mask
from data_pipes.records import RecordFile
from data_pipes.video import open_video
from vr_jax import cli
from vr_jax.agent import VideoReferAgent

SEEDS = (0, 4, 7)
CONTEXT = Context(lambda: None, "", "en")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
  """Three scenes, a duplicate of one, a still video, a broken file, and two scenes in one file."""
  folder = tmp_path_factory.mktemp("videos")
  frames = {seed: render(make_scene(seed))[0] for seed in (*SEEDS, 9, 11)}
  for seed in SEEDS:
    write_video(folder / f"{seed}.mp4", frames[seed])
  write_clip(folder / "copy.mp4", open_video(frames[0]), 0, 40)  # the same, encoded again
  write_video(folder / "still.mp4", np.repeat(frames[0][:1], 40, 0))
  write_video(folder / "two.mp4", np.concatenate([frames[11], frames[9]]))
  (folder / "broken.mp4").write_bytes(b"\0" * 2000)
  captions = [{"video": f"{s}.mp4", "caption": scene_caption(make_scene(s))} for s in SEEDS]
  captions += [
    {"video": "copy.mp4", "caption": "A ball rolls."},
    {"video": "still.mp4", "caption": "A ball rolls."},
    {"video": "two.mp4", "caption": "A red ball rolls over the ground."},
    {"video": "broken.mp4", "caption": "A ball rolls."},
    {"video": "absent.mp4", "caption": "A ball rolls."},
  ]
  (folder / "captions.json").write_text(json.dumps(captions))
  return folder


def config(videos: Path, **changes):
  c = stages.engine_config()
  c.input.videos, c.input.files = str(videos), (str(videos / "captions.json"),)
  c.workers = 1
  c.shards = 2
  for key, value in changes.items():
    c[key] = value
  return c


@pytest.fixture(scope="module")
def detailed(videos, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "w"
  return command.run(config(videos), workdir)


def by_stage(summary) -> dict[str, dict]:
  return {e["stage"]: e for e in summary["stages"]}


def test_the_detailed_path_writes_published_files_without_a_defect(detailed):
  out = Path(detailed["workdir"]) / "out"
  media = Path(detailed["workdir"]) / "media"
  for name in ("detailed-caption", "short-caption"):
    path, provenance = file_paths(out, name)
    records = RecordFile(path)
    assert len(records) >= 5
    sources = [json.loads(line) for line in provenance.read_text().splitlines()]
    assert [s["id"] for s in sources] == [records[i].id for i in range(len(records))]
    for i in range(len(records)):
      record = records[i]
      video = open_video(media / record.path)
      assert record.size == video.size
      assert set(record.objects[0]) == set(grid_frames(len(video)).tolist())
      for mask in record.objects[0].values():
        if mask is not None:
          assert segmentation_to_mask(mask, *video.size).any()


def test_every_sample_says_where_it_came_from(detailed):
  _, provenance = file_paths(Path(detailed["workdir"]) / "out", "detailed-caption")
  for line in provenance.read_text().splitlines():
    source = json.loads(line)
    assert set(source["agents"]) >= {"10_analyze", "20_segment", "30_annotate", "40_review",
                                     "50_refine"}  # fmt: skip
    assert source["text_source"] == "measured"
    assert source["review"]["same_object"]
    assert source["review"]["region_text"]
    assert len(source["video_hash"]) == 24
    assert source["scores"][0]["visible_frames"] > 0


def test_bad_videos_are_set_aside_with_the_reason(detailed):
  table = by_stage(detailed)
  assert table["00_ingest"]["quarantined"] == 2
  reasons = " ".join(table["00_ingest"]["reasons"])
  assert "broken.mp4" in reasons
  assert "absent.mp4" in reasons
  assert table["05_shots"]["reasons"] == {"shot near-static": 1}
  assert table["06_unique"]["reasons"] == {"near-duplicate": 1}


def test_a_video_of_two_shots_becomes_two_files(detailed):
  store = Store(detailed["workdir"])
  clips = [row for row in store.rows("05_shots") if row["source"] == "two.mp4"]
  assert [(c["start"], c["end"]) for c in clips] == [(0, 40), (40, 80)]
  media = Path(detailed["workdir"]) / "media"
  assert len(open_video(media / clips[0]["video"])) == 40
  frame = open_video(media / clips[1]["video"]).frames([3])[0].astype(int)
  expected = render(make_scene(9))[0][3].astype(int)
  assert np.abs(frame - expected).mean() < 4  # the right frames, twice encoded


def test_masks_lie_on_what_the_noun_names(detailed):
  store = Store(detailed["workdir"])
  clips = {row["key"]: row for row in store.rows("06_unique")}
  found = []
  for row in store.rows("20_segment"):
    clip = clips[row["clip_id"]]
    if clip["source"] == "two.mp4":
      continue
    scene = make_scene(int(Path(clip["source"]).stem) if clip["source"] != "copy.mp4" else 0)
    names = [t.full_name for t in scene.things]
    truth = render(scene)[1][names.index(row["noun"])]
    pairs = [(segmentation_to_mask(m, 96, 128), truth[int(n)]) for n, m in row["masks"].items()]
    found.append(np.mean([masks.iou(a, b) for a, b in pairs]))
  assert len(found) >= 8
  assert np.median(found) > 0.7


def test_the_short_path_takes_the_caption_as_the_label(videos, tmp_path):
  c = config(videos, path="short")
  c.input.limit = 1
  summary = command.run(c, tmp_path / "w")
  path, _ = file_paths(tmp_path / "w" / "out", "short-caption")
  answers = {RecordFile(path)[i].turns[1].text for i in range(len(RecordFile(path)))}
  assert answers == {scene_caption(make_scene(0))}
  assert "30_annotate" not in by_stage(summary)


@pytest.fixture(scope="module")
def qa_run(tmp_path_factory):
  folder = make_set(tmp_path_factory.mktemp("set"), 3, 1, 2, dialogues=1)
  c = stages.engine_config()
  c.path, c.workers, c.shards = "qa", 1, 1
  c.input.videos, c.input.files = str(folder), (str(folder / "short_captions.json"),)
  return command.run(c, folder / "run")


def test_the_qa_path_starts_from_given_masks(qa_run):
  path, provenance = file_paths(Path(qa_run["workdir"]) / "out", "qa")
  records = RecordFile(path)
  assert len(records) == 3
  types = {t for line in provenance.read_text().splitlines() for t in json.loads(line)["types"]}
  assert types == {"basic", "reasoning", "future"}
  for i in range(3):
    record = records[i]
    assert record.turns[0].text.startswith("<video>\nThere are")
    assert record.turns[0].text.count("<region>") == len(record.objects) >= 2
    assert "{0}" not in " ".join(t.text for t in record.turns)


TRAIN = """
import sys
from vr_jax.configs import load_config
from vr_jax.training.loop import train
c = load_config("mini_stages:stage=3,steps=3,batch=8").unlock()
c.input.media, *c.input.files = sys.argv[2:]
c.input.files, c.input.max_unreadable, c.log_steps = tuple(c.input.files), 0.0, 1
train(c.lock(), sys.argv[1])
"""


@pytest.mark.slow
def test_the_written_files_train_vr_mini(qa_run, detailed, tmp_path):
  from vr_jax.training.metrics import read_metrics

  media = tmp_path / "media"
  media.mkdir()
  files = []
  for summary, name in ((qa_run, "qa"), (detailed, "detailed-caption")):
    path, _ = file_paths(Path(summary["workdir"]) / "out", name)
    items = json.loads(path.read_text())
    (media / name).symlink_to(Path(summary["workdir"]) / "media")
    for item in items:
      item["video"] = f"{name}/{item['video']}"
    (tmp_path / f"{name}.json").write_text(json.dumps(items))
    files.append(tmp_path / f"{name}.json")
  command_ = [sys.executable, "-c", TRAIN, tmp_path / "model", media, *files]
  subprocess.run(list(map(str, command_)), check=True)
  losses = [m["loss"] for m in read_metrics(tmp_path / "model") if "loss" in m]
  assert len(losses) == 3
  assert np.isfinite(losses).all()


def test_a_changed_setting_redoes_its_stage_and_keeps_the_others(videos, detailed):
  workdir = detailed["workdir"]
  store = Store(workdir)
  before = {s: store.path(s, 0).stat().st_mtime_ns for s in ("20_segment", "25_masks", "40_review")}
  c = config(videos)
  c.masks.max_flicker = 0.5
  command.run(c, workdir)
  after = {s: store.path(s, 0).stat().st_mtime_ns for s in before}
  assert after["20_segment"] == before["20_segment"]
  assert after["25_masks"] != before["25_masks"]


def test_without_a_caption_what_moves_is_taken(golden, tmp_path):
  """An H.264 clip whose ground has every colour: an ellipse crosses it."""
  path = golden / "media" / "clip_mp4.mp4"
  (tmp_path / "a.mp4").symlink_to(path)
  c = config(tmp_path, shards=1, drop_static=False)
  c.input.files = ()
  summary = command.run(c, tmp_path / "w")
  (item,) = json.loads(file_paths(tmp_path / "w" / "out", "detailed-caption")[0].read_text())
  assert by_stage(summary)["60_assemble"]["kept"] == 2
  assert item["conversations"][1]["value"].startswith("The moving object")
  (objects,) = item["annotation"]
  frame = open_video(path).frames([5])[0]
  ellipse = np.abs(frame.astype(int) - (175, 45, 130)).max(-1) < 35
  found = segmentation_to_mask(objects["5"]["segmentation"], *frame.shape[:2])
  assert masks.iou(found.astype(bool), ellipse) > 0.6


@pytest.mark.slow
def test_the_whole_graph_runs_on_real_clips(media_dir, tmp_path):
  """Every path, as a user calls it; the second starts from what the first has made."""
  captions = {
    "dog.mp4": "A brown dog sits on a bed and turns its head.",
    "2.mp4": "A person cuts a green watermelon on a table with a knife.",
    "4.mp4": "A woman in a blue jacket sings in front of a market stall.",
  }
  listed = [{"video": name, "caption": text} for name, text in captions.items()]
  (tmp_path / "c.json").write_text(json.dumps(listed))
  detailed = ("detailed", media_dir, tmp_path / "c.json")
  made = tmp_path / "detailed" / "out" / "videorefer-detailed-caption.json"
  qa = ("qa", tmp_path / "detailed" / "media", made)
  for name, folder, file in (detailed, qa):
    asked = f"engine_embedded:videos={folder},captions={file},path={name}"
    workdir = tmp_path / name
    words = ["engine", "run", "--config", asked, "--workdir", str(workdir), "--config.shards=1"]
    assert cli.main([*words, "--config.drop_static=False"]) == 0
    files = sorted((workdir / "out").glob("*.json"))
    assert len(files) == {"detailed": 2, "qa": 1}[name]
    for path in files:
      assert cli.main(["data", "check", str(path), "--media", str(workdir / "media")]) == 0
  assert len(json.loads(made.read_text())) >= 5


def test_both_names_of_our_own_model_are_one_agent(videos, tmp_path):
  """Configs and runs made before name it vr_jax.engine:VideoReferAgent."""
  prints = []
  for target in ("vr_jax.agent:VideoReferAgent", "vr_jax.engine:VideoReferAgent"):
    agent = {"kind": "python", "target": target}
    assert backend_class("annotator", agent) is VideoReferAgent
    c = config(videos).unlock()
    c.roles = {**c.roles, "annotator": agent, "describer": agent, "judge": agent}
    settings = stages.check_settings(c, tmp_path)
    prints.append([stage.fingerprint for stage in stages.make_graph(settings).stages])
  assert prints[0] == prints[1]  # a run goes on under either name


@pytest.mark.slow
def test_our_own_model_describes_objects(tmp_path):
  """The packaged vr-mini as Annotator and region describer, on its own little world."""
  write_video(tmp_path / "0.mp4", render(make_scene(0))[0])
  item = {"video": "0.mp4", "caption": scene_caption(make_scene(0))}
  (tmp_path / "captions.json").write_text(json.dumps([item]))
  agent = {"kind": "python", "target": "vr_jax.agent:VideoReferAgent"}
  c = config(tmp_path, shards=1).unlock()
  c.roles = {**c.roles, "annotator": agent, "describer": agent}
  summary = command.run(c, tmp_path / "w")
  _, provenance = file_paths(tmp_path / "w" / "out", "detailed-caption")
  made = [json.loads(line) for line in provenance.read_text().splitlines()]
  assert by_stage(summary)["30_annotate"]["quarantined"] == 0
  assert made
  assert all(m["agents"]["30_annotate"]["backend"] == "videorefer vr-mini" for m in made)
  assert all(m["text_source"] == "model" for m in made)
  assert VideoReferAgent(CONTEXT).model is VideoReferAgent(CONTEXT).model


@pytest.mark.parametrize(
  ("shares", "same", "confidence"),  # of yes, Yes, no, No
  [((0.2, 0.4, 0.1, 0.1), True, 0.75), ((0.01, 0.0, 0.05, 0.04), False, 0.9)],
)
def test_our_own_model_judges_by_looking(shares, same, confidence):
  """Its confidence is the likelihood of its verdict, of yes and no."""
  asked = []

  def choices(requests, options):
    asked.extend(requests)
    assert options == [("yes", "Yes", "no", "No")]
    return [tuple(math.log(share) if share else -1e9 for share in shares)]

  agent = object.__new__(VideoReferAgent)
  agent.model, agent.turn = SimpleNamespace(choices=choices), threading.Lock()
  masks = {0: np.ones((2, 2), bool), 5: np.zeros((2, 2), bool)}
  claim = Claim(Clip("a.mp4", "", 9, None, 2, 2), "ball", "It is <red>.", "A region.", masks, 0)
  verdict = agent.compare(claim)
  assert verdict.same_object == same
  assert verdict.confidence == pytest.approx(confidence)
  (request,) = asked
  assert request.video == "a.mp4"
  assert "<red>" not in request.question
  assert "It is \\u003cred\\u003e." in request.question
  assert [list(masks) for masks in request.annotation] == [[0]]


# Parts


@pytest.mark.parametrize(
  ("caption", "subjects"),
  [
    ("A dog is lying on a couch and eating a slice of melon.", ("dog",)),
    ("A woman in a white dress is walking past a market stall.", ("woman",)),
    ("A person drives a car down the road.", ("person",)),
    ("Two men are fishing on a boat while a child watches.", ()),
    (
      "a small red plain ball and a large blue striped star. The red ball pushes the blue star.",
      ("small red plain ball", "large blue striped star"),
    ),
    ("", ("moving object",)),
  ],
)
def test_subjects_of_captions(caption, subjects):
  assert NounPhrases(CONTEXT).nouns(Clip("", caption, 1, None, 1, 1)).subjects == subjects


def test_measured_facts_follow_the_script():
  scene = make_scene(3)
  frames, truth = render(scene)
  for i, thing in enumerate(scene.things):
    if thing.change or thing.steps[0].startswith(("in", "out")):
      continue
    numbers = sorted(set(grid_frames(40).tolist()))
    clip = Clip(list(frames), "", 40, 10.0, 96, 128)
    facts = measure_object(clip, {n: truth[i, n] for n in numbers})
    assert facts["colour"] == thing.colour
    moves = [s for s in thing.steps if s != "still"]
    assert [s for s in facts["steps"] if s != "still"] == moves


def test_the_judge_goes_by_colours():
  judge = AttributeJudge(CONTEXT)
  clip = Clip("", "", 1, None, 1, 1)
  red, blue = (
    Claim(clip, "red ball", "It moves.", f"A {colour} region (80% of it) at the top.", {}, 0)
    for colour in ("red", "blue")
  )
  assert judge.compare(red).same_object
  verdict = judge.compare(blue)
  assert not verdict.same_object
  assert verdict.reason == "the noun says red, the region is blue"


def test_colour_names():
  pixels = np.array([[225, 40, 40], [40, 175, 60], [255, 255, 255], [10, 10, 10], [120, 120, 120]])
  assert [NAMES[i] for i in name_pixels(pixels)] == ["red", "green", "white", "black", "grey"]


def disc(x, y, r=8):
  ys, xs = np.mgrid[:60, :90]
  return (xs - x) ** 2 + (ys - y) ** 2 <= r * r


@pytest.mark.parametrize(
  ("tracks", "expected"),
  [
    ([disc(20 + 3 * n, 30) for n in range(12)], None),
    ([disc(30, 30) if n % 2 else np.zeros((60, 90), bool) for n in range(12)], "mask flickers"),
    ([disc(30, 30, 12 if n % 2 else 5) for n in range(12)], "mask flickers"),
    ([disc(15, 30) if n % 2 else disc(75, 30) for n in range(12)], "mask jumps"),
    ([disc(30, 30) if n < 6 else disc(55, 30) for n in range(12)], "mask changes its looks"),
    ([disc(30, 30, 0.5) for n in range(12)], "mask too small"),
    ([disc(45, 30, 60) for n in range(12)], "mask too large"),
    ([disc(30, 30) if n == 3 else np.zeros((60, 90), bool) for n in range(12)], "seen too rarely"),
  ],
)
def test_masks_that_flicker_jump_or_swap_are_told(tracks, expected):
  frame = np.zeros((60, 90, 3), np.uint8)
  frame[:, :43] = (200, 40, 40)
  frame[:, 43:] = (40, 60, 200)  # another object's colours on the right
  if expected is None or "jumps" in expected:
    frame[:] = (200, 40, 40)
  quality = masks.measure(dict(enumerate(tracks)), dict.fromkeys(range(12), frame))
  fault = masks.fault(quality, masks.LIMITS)
  assert fault is None if expected is None else expected in fault


@pytest.mark.parametrize(
  ("said", "expected"),
  [
    ("The dog runs to the left and jumps over the fence.", None),
    ("I'm sorry, but I can't assist with that request.", "text refuses"),
    ("As an AI language model I do not see any dog.", "text refuses"),
    ("Le chien court dans le jardin avec une balle.", "text in another language: fr"),
    ("Der Hund läuft mit dem Ball und ist braun.", "text in another language: de"),
    ("狗在跑步并跳过栅栏", "text too short"),
    ("Собака бежит по дороге к дому", "text in another language: script"),
    ("", "text empty"),
    ("dog", "text too short"),
    ("The red outline shows a dog that runs.", "text talks about the picture"),
    ("the dog runs " * 12, "text repeats itself"),
  ],
)
def test_rules_for_texts(said, expected):
  fault = text.fault(said)
  assert fault is None if expected is None else expected in fault


def test_perceptual_hashes_tell_copies_from_others():
  frames = [render(make_scene(seed))[0][20] for seed in range(6)]
  first = perceptual_hash(frames[0])
  brighter = np.clip(frames[0].astype(int) + 25, 0, 255).astype(np.uint8)
  assert duplicates.distance(first, perceptual_hash(brighter)) <= 4
  small = np.ascontiguousarray(frames[0][::2, ::2])
  assert duplicates.distance(first, perceptual_hash(small)) <= 6
  assert duplicates.distance(first, perceptual_hash(frames[0][:, ::-1])) > 12


def test_benchmark_videos_never_get_in(videos, tmp_path):
  bench = tmp_path / "bench"
  bench.mkdir()
  mirrored = render(make_scene(7))[0][:, :, ::-1]
  write_clip(bench / "held_out.mp4", open_video(mirrored), 0, 40)
  c = config(videos, path="short")
  c.duplicates.benchmark = (str(bench),)
  ref = stages.graph_ref(stages.check_settings(c, tmp_path / "w"))
  store = Store(tmp_path / "w", 2)
  run_stages(ref, store, stages=["00_ingest", "05_shots", "06_unique"])
  assert manifest(store, ref.build())[2]["reasons"] == {"benchmark video": 1, "near-duplicate": 1}
  assert "7.mp4" not in {row["source"] for row in store.rows("06_unique")}


def test_the_benchmarks_own_file_is_dropped_with_all_its_shots(videos, tmp_path):
  (tmp_path / "two.mp4").write_bytes((videos / "two.mp4").read_bytes())
  row = {"video_id": content_hash(videos / "two.mp4"), "video": "videos/two.mp4"}
  row |= {"hashes": ["0"] * 3, "mirrored": ["f"] * 3}
  settings = {
    "workdir": str(tmp_path / "w"),
    "duplicates": {"benchmark": [str(tmp_path / "two.mp4")], "distance": 8},
  }
  dropped = survey_duplicates(settings)([row | {"key": key} for key in ("a", "b")])
  assert dropped == dict.fromkeys("ab", f"benchmark video: the file is {tmp_path}/two.mp4")


def test_benchmarks_that_are_not_there_are_no_check(videos, tmp_path):
  c = config(videos, path="short")
  c.duplicates.benchmark = (str(tmp_path / "nothing"),)
  with pytest.raises(InputError, match="found no videos"):
    command.run(c, tmp_path / "w")


def test_cuts_are_found_and_smooth_motion_is_none():
  a, b = render(make_scene(0))[0], render(make_scene(9))[0]
  shots = find_shots(open_video(np.concatenate([a, b, a[::-1]])))
  assert [asdict(s)["start"] for s in shots] == [0, 40, 80]
  assert len(find_shots(open_video(a))) == 1


def test_cuts_of_the_real_clips(media_dir):
  cuts = {"dog.mp4": [73], "2.mp4": [77, 226, 344], "4.mp4": []}
  for name, expected in cuts.items():
    assert [s.start for s in find_shots(open_video(media_dir / name))][1:] == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"path": "long"}, r"config.path='long'; accepted: short, detailed, qa"),
    ({"order": "paper"}, "works on masks; accepted: order 'mask_first'"),
    ({"roles": {"judge": {"kind": "builtin"}}}, "config.roles.analyzer is missing"),
    ({"roles": {"seer": {"kind": "builtin"}}}, "config.roles.seer is no role"),
  ],
)
def test_settings_that_cannot_work(videos, tmp_path, change, message):
  c = stages.engine_config()
  with c.unlocked():
    for key, value in change.items():
      c[key] = value
  with pytest.raises(InputError, match=message):
    stages.check_settings(c, tmp_path)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kind": "vllm"}, "found kind 'vllm'; accepted: builtin, openai, or python"),
    ({"kind": "python"}, "needs target"),
    ({"kind": "python", "target": "no_such_module:X"}, "no_such_module"),
    ({"kind": "openai", "model": "m"}, "kind 'openai' needs base_url"),
    ({"kind": "openai", "base_url": "u", "modle": "m"}, "modle is not known; accepted"),
  ],
)
def test_backends_that_do_not_exist(tmp_path, options, message):
  c = stages.engine_config()
  with c.unlocked():
    c.roles = {**c.roles, "judge": options}
  with pytest.raises(InputError, match=message):
    stages.check_settings(c, tmp_path)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("c.json", "[3]", "found int; accepted: an object with 'video'"),
    ("c.json", '[{"caption": "x"}]', "accepted: 'video' and 'caption'"),
    ("c.jsonl", '{"video": "a.mp4"}\n{', "c.jsonl:2"),
    ("c.json", "[]", "found no videos"),
  ],
)
def test_lists_of_videos_that_are_not_in_the_format(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  c = stages.engine_config()
  c.input.videos, c.input.files = str(tmp_path), (str(tmp_path / name),)
  with pytest.raises(InputError, match=message):
    command.run(c, tmp_path / "w")
