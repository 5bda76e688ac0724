"""The data side of VideoRefer's successors: golden cases, frames, prompts and samples."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.jobs import run_local
from data_pipes.loader import make_dataset
from data_pipes.navit_frames import annotated_frames, scene_frames, step_frames
from data_pipes.navit_packing import NavitRows, NavitSamples, plan_navit_rows
from data_pipes.navit_prompts import (
  IMAGE_TOKEN,
  REGION_TOKEN,
  dialogue_text,
  question_text,
  special_id,
  video_text,
)
from data_pipes.navit_rows import Ids
from data_pipes.navit_samples import NavitRules, question_sample, training_sample
from data_pipes.object_crops import LITE, PIXELREFER
from data_pipes.prepare import Prepare, Settings
from data_pipes.prompts import IGNORE, Turn
from data_pipes.records import RecordFile, parse_record
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import open_video
from vr_jax.configs import load_config
from vr_jax.parity import successors_data
from vr_jax.parity.golden import PASS, Golden
from vr_jax.training.videorefer_task import videorefer_task

GOLDEN = Path(__file__).parent / "golden"
STAGES = (
  "region_prep",
  "preprocess",
  "prompts",
  "smart_resize",
  "frame_sample",
  "training_samples",
)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
  """The data side of a golden folder, in one piece."""
  folder = tmp_path_factory.mktemp("successors")
  shutil.copytree(GOLDEN / "successors/data_side", folder, dirs_exist_ok=True)
  shutil.copytree(GOLDEN / "media", folder / "media")
  for name in ("vl3", "pixelrefer", "lite"):
    shutil.copytree(folder / "tokenizer", folder / name, dirs_exist_ok=True)
  return Golden(folder)


@pytest.fixture(scope="module")
def tokenizer(golden):
  return Tokenizer.from_folder(golden.folder / "lite")


@pytest.mark.parametrize("stage", STAGES)
def test_golden_cases(golden, stage):
  results = list(getattr(successors_data, stage)(golden))
  assert results
  assert {r.status for r in results} == {PASS}, "\n".join(str(r) for r in results)
  assert not any(r.unknown for r in results)


def clip(golden):
  return open_video(golden.folder / "media/clip_mp4.mp4")  # 40 frames, 10 a second


# Frames


def write_clip(path, frames, rate):
  """Frame i shows its number in eight stripes, black for 0 and white for 1."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=rate)
    stream.width, stream.height, stream.pix_fmt = 64, 16, "yuv420p"
    for i in range(frames):
      bits = [255 * (i >> bit & 1) for bit in range(8)]
      image = np.repeat(np.array(bits, np.uint8), 8)[None, :, None] * np.ones((16, 1, 3), np.uint8)
      for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
        container.mux(packet)
    for packet in stream.encode():
      container.mux(packet)


def number(image):
  return sum(int(image[:, 8 * bit + 2 : 8 * bit + 6].mean() > 128) << bit for bit in range(8))


def filtered(path, fps):
  """Numbers of the frames that FFmpeg's own filter gives."""
  with av.open(str(path)) as container:
    stream, graph = container.streams.video[0], av.filter.Graph()
    source = graph.add_buffer(template=stream, time_base=stream.time_base)
    rate, sink = graph.add("fps", f"fps={fps}:round=down"), graph.add("buffersink")
    source.link_to(rate)
    rate.link_to(sink)
    graph.configure()
    numbers = []
    for frame in [*container.decode(stream), None]:
      graph.push(frame)
      while True:
        try:
          numbers.append(number(sink.pull().to_ndarray(format="rgb24")))
        except (BlockingIOError, av.error.EOFError):
          break
  return numbers


def test_the_filter_rule_is_that_of_ffmpeg(tmp_path):
  for frames, rate in ((57, 10), (40, 24), (65, 7)):
    path = tmp_path / f"{rate}.mp4"
    write_clip(path, frames, rate)
    video = open_video(path)
    for fps in (1, 0.5, 3, 4, 30):
      scene = scene_frames(video, fps)
      ours = [number(image) for image in video.frames(scene.ids)]
      theirs = filtered(path, fps)
      assert not theirs or ours == theirs, (frames, rate, fps)
      assert scene.times == [i / fps for i in range(len(ours))] or not theirs


def test_a_clip_shorter_than_a_step_still_has_a_frame(golden):
  assert scene_frames(clip(golden), 0.2).ids == step_frames(40, 10.0, 0.2, 768) == [20]


def test_the_two_rules_differ(golden):
  by_filter, by_ids = (scene_frames(clip(golden), 1, rule=rule) for rule in ("filter", "ids"))
  assert (by_filter.ids, by_ids.ids) == ([9, 19, 29, 39], [5, 15, 25, 35])
  assert (list(by_filter.times), by_ids.times) == ([0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.5, 3.5])


def test_a_range_is_cut_before_frames_are_chosen(golden):
  scene = scene_frames(clip(golden), 1, start=1.5, end=3.5)
  assert (scene.ids, list(scene.times)) == ([24, 34], [1.5, 2.5])
  short = scene_frames(clip(golden), 1, start=1.5, end=2.0)  # below a second: the ids rule
  assert short.ids == [17]


@pytest.mark.parametrize(
  ("kwargs", "says"),
  [
    ({"fps": 0}, "0 frames a second"),
    ({"fps": float("nan")}, "nan frames a second"),
    ({"max_frames": 0}, "at most 0 frames"),
    ({"rule": "decord"}, "accepted: filter, ids"),
    ({"start": 7.0}, "no frame lies between 7 s"),
  ],
)
def test_scenes_that_cannot_be_chosen_are_refused(golden, kwargs, says):
  with pytest.raises(InputError, match=says):
    scene_frames(clip(golden), **kwargs)


def test_annotated_frames_come_once_and_in_order(golden):
  scene = annotated_frames(clip(golden), [[30, 5], [5, 12]])
  assert (scene.ids, scene.times) == ([5, 12, 30], [0.5, 1.2, 3.0])


# Prompts


def test_times_round_as_the_loader_that_gave_them():
  assert video_text([1], [0.35]) == "Time 0.3s:<image>\n"
  assert video_text([1], [np.float64(0.35)]) == "Time 0.4s:<image>\n"
  assert video_text([1, 2], [0, 1.25]) == "Time 0s:<image>,Time 1.2s:<image><image>\n"


def test_the_newline_between_tag_and_question_goes(tokenizer):
  texts = [
    question_text(f"{front}What is <region>?", tokenizer, "image", ["<image>\n"], ["[<REGION>]"])[0]
    for front in ("<image>\n", "", "<image>  ")
  ]
  assert set(texts) == {
    "<|im_start|>user\n<image>\nWhat is [<REGION>]?<|im_end|>\n<|im_start|>assistant\n"
  }


@pytest.mark.parametrize(
  ("question", "scene", "says"),
  [
    ("What?", ["s"], "found 0 <region> but 1 objects"),
    ("<video> and <video>, <region>", ["s"], "found 2 <video> in the text; accepted: 1"),
  ],
)
def test_tags_must_fit(tokenizer, question, scene, says):
  with pytest.raises(InputError, match=says):
    question_text(question, tokenizer, "video", scene, ["[]"])


def test_targets_end_before_the_newline(tokenizer):
  turns = [Turn("human", "Hi"), Turn("gpt", "Hello."), Turn("human", "Yes"), Turn("gpt", "No.")]
  text = dialogue_text(turns, tokenizer, None, [], [])
  targets = text.ids[text.labels != IGNORE]
  assert tokenizer.decode(targets) == "Hello.<|im_end|>No.<|im_end|>"
  assert text.labels[0] == text.labels[-1] == IGNORE


def test_a_tokenizer_without_the_tokens_is_refused():
  plain = Tokenizer.from_folder(GOLDEN / "tiny_videorefer_qwen2")
  with pytest.raises(InputError, match="no token '<REGION>'"):
    special_id(plain, REGION_TOKEN)


# Samples

RULES = NavitRules(PIXELREFER, tokens=12, max_length=120)
LITE_RULES = NavitRules(LITE, tokens=8, max_length=400)
BOX = np.zeros((64, 96), np.uint8)
BOX[20:40, 30:60] = 1


def test_a_question_about_objects_at_different_times(golden, tokenizer):
  objects = [{7: BOX}, {30: BOX, 31: BOX}]
  prompt, sample = question_sample(
    clip(golden), "Is <region> larger than <region>?", tokenizer, RULES, objects
  )
  assert prompt.startswith("<|im_start|>user\nTime 0.5s:<image>")
  assert len(sample.objects) == 2  # one frame an object
  scene = sum(picture.tokens for picture in sample.scene)
  ids = sample.ids.tolist()
  assert ids.count(special_id(tokenizer, IMAGE_TOKEN)) == scene
  assert ids.count(special_id(tokenizer, REGION_TOKEN)) == 24


def test_lite_sees_objects_at_all_their_times_and_no_scene(golden, tokenizer):
  objects = [{7: BOX}, {30: BOX, 31: BOX, 32: np.zeros_like(BOX)}]
  prompt, sample = question_sample(
    clip(golden), "<video>\n<region> and <region>?", tokenizer, LITE_RULES, objects
  )
  eight = REGION_TOKEN * 8
  assert f"user\n[Time 0.7:{eight}] and [Time 3.0:{eight},Time 3.1:{eight}]?<|im_end|>" in prompt
  assert (sample.scene, len(sample.objects)) == ([], 3)
  with pytest.raises(InputError, match="sees marked objects alone"):
    question_sample(clip(golden), "What happens?", tokenizer, LITE_RULES)


def test_an_image_is_read_patch_by_patch_whatever_the_caller_says(tmp_path, tokenizer):
  Image.new("RGB", (70, 56), (9, 8, 7)).save(tmp_path / "i.png")
  mask = np.ones((56, 70), np.uint8)
  prompt, sample = question_sample(
    tmp_path / "i.png", "Describe the region <region>.", tokenizer, RULES, [{0: mask}]
  )
  assert sample.scene[0].grid == (4, 5)
  assert prompt.count(IMAGE_TOKEN) == 20


@pytest.mark.parametrize(
  ("objects", "says"),
  [
    ([{40: BOX}], "object 0: found frame 40; accepted: 0 to 39"),
    ([{0: BOX[1:]}], "object 0, frame 0: found a mask of 63x96"),
    ([{0: None}], "mask 0 is empty"),
    ([{0: BOX}] * 2, "found 1 <region> but 2 objects"),
  ],
)
def test_objects_that_do_not_fit_are_refused(golden, tokenizer, objects, says):
  with pytest.raises(InputError, match=says):
    question_sample(clip(golden), "<region>?", tokenizer, RULES, objects)


def test_shards_hold_what_training_reads(golden, tokenizer, tmp_path):
  folder, file = golden.folder, golden.folder / "json/train.json"
  settings = {"shards": 1, "size": 0, "format": "png", "scene": (1,)}
  out = Prepare.start(
    tmp_path / "s", Settings((str(file),), str(folder), scene_fps=1.0, **settings)
  )
  run_local(out, 1)
  stored = list(ShardSet(tmp_path / "s"))
  assert len(stored) == 7  # all but the list of pictures
  records = {record.turns: record for record in RecordFile(file)}
  for record in stored:
    ours = training_sample(record, tokenizer, RULES)
    theirs = training_sample(records[record.turns], tokenizer, RULES, folder)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    for a, b in zip(ours.pictures(), theirs.pictures(), strict=True):
      np.testing.assert_array_equal(a.patches, b.patches)
  squares = Settings((str(file),), str(folder), **settings | {"size": 28})
  run_local(Prepare.start(tmp_path / "t", squares), 1)
  clip = next(record for record in ShardSet(tmp_path / "t") if record.media)
  with pytest.raises(InputError, match=r"squares of 28 pixels; accepted: shards .* --size 0"):
    training_sample(clip, tokenizer, RULES)
  with pytest.raises(InputError, match="scene_fps of 0, or more with size 0"):
    Settings((str(file),), str(folder), scene_fps=1.0)


def test_a_bad_training_sample_is_named(golden, tokenizer):
  item = json.loads((golden.folder / "json/train.json").read_text())[0]
  record = parse_record(item | {"video": ["media/none.mp4"]}, "train.json: item 0")
  with pytest.raises(InputError, match=r"train.json: item 0: .*none.mp4: no such video"):
    training_sample(record, tokenizer, RULES, golden.folder)


# Rows


def test_samples_share_rows_that_hold_them_whole(golden, tokenizer):
  records = RecordFile(golden.folder / "json/train.json")
  ids = Ids(special_id(tokenizer, IMAGE_TOKEN), special_id(tokenizer, REGION_TOKEN), 12)
  failures = Failures(0.5)
  sets = [NavitSamples(records, tokenizer, RULES, golden.folder)]
  plan = plan_navit_rows(sets, 256, merge=2, tokens_per_object=12, failures=failures)
  assert sorted(i for row in plan.rows for i in row) == list(range(8))
  assert len(plan.rows) <= 4
  rows = NavitRows(sets, plan, ids, failures)
  batches = make_dataset([rows], batch_size=2, seed=0, drop_remainder=False, failures=failures)
  batch = batches[0]
  samples = [sets[0].sample(i) for i in range(8)]
  supervised = sum((s.labels != IGNORE).sum() for s in samples)
  total = [batches[i] for i in range(len(batches))]
  assert sum(b["supervised"].sum() for b in total) == supervised
  assert sum(b["valid"].sum() for b in total) == sum(len(s.ids) for s in samples)
  assert batch["patches"].shape == (2, plan.shape.tower_rows, plan.shape.patches, 588)
  assert not len(failures)


SMALL = (
  *(("img.heads", 2), ("img.width", 32), ("img.depth", 1), ("img.mlp_dim", 32)),
  *(("img.max_tokens", 120), ("connector.width", 16), ("region.width", 16), ("region.tokens", 12)),
  *(("llm.kv_heads", 1), ("llm.heads", 2), ("llm.width", 16), ("llm.depth", 1)),
  *(("llm.head_dim", 8), ("llm.mlp_dim", 16), ("llm.vocab_size", 1007)),
)


def small_config(golden, name="pixelrefer_stage1", **changes):
  """A stage's config on the golden samples, with a model too small to take time."""
  config = load_config(f"configs/{name}.py")
  config.model += SMALL
  config.tokenizer = str(golden.folder / "pixelrefer")
  config.input.files = (str(golden.folder / "json/train.json"),)
  config.input.media = str(golden.folder)
  config.input.pack, config.input.batch_size, config.input.accum_steps = 256, 2, 1
  config.input.max_unreadable = 0.5
  for key, value in changes.items():
    config.input[key] = value
  return config


def test_a_stage_of_pixelrefer_gives_batches_of_packed_rows(golden):
  task = videorefer_task(small_config(golden))
  assert task.data_size == 3
  (batch,) = task.batches(0, 1)
  assert batch["tokens"].shape == (2, 256)
  slots, flops = task.work(batch)
  assert slots == batch["valid"].sum() > 256
  assert flops > 0
  assert len(task.names(0, 1)) == sum(int(s.max()) + 1 for s in batch["segments"])


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"pack": 0}, "packed rows of one mix; accepted: pack=SLOTS"),
    ({"pack": 64}, "slots; accepted: rows of 64"),
    ({"weights": (1.0,)}, "no buckets, row_length, features or weights"),
  ],
)
def test_rows_that_pictures_of_any_size_cannot_have_are_refused(golden, changes, says):
  with pytest.raises(InputError, match=says):
    videorefer_task(small_config(golden, **changes))


def test_an_unreadable_sample_is_counted_and_the_others_of_its_row_stay(
  golden, tokenizer, tmp_path
):
  items = json.loads((golden.folder / "json/train.json").read_text())
  items[0]["video"] = ["media/none.mp4"]
  (tmp_path / "train.json").write_text(json.dumps(items))
  ids = Ids(special_id(tokenizer, IMAGE_TOKEN), special_id(tokenizer, REGION_TOKEN), 12)
  failures = Failures(0.5)
  sets = [NavitSamples(RecordFile(tmp_path / "train.json"), tokenizer, RULES, golden.folder)]
  plan = plan_navit_rows(sets, 256, merge=2, tokens_per_object=12, failures=failures)
  assert len(failures) == 1
  assert sorted(i for row in plan.rows for i in row) == list(range(1, 8))
  assert len(NavitRows(sets, plan, ids, failures)[0]["tokens"]) == 256
