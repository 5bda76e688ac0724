"""Models of VideoRefer's successors: tower, compressor, cells, folders, answers."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from data_pipes.errors import InputError
from data_pipes.navit_rows import (
  Crop,
  Ids,
  Picture,
  Sample,
  build_row,
  cells_of,
  even_start,
  needed_shape,
  pack,
)
from data_pipes.video import open_video
from vr_jax import cli
from vr_jax.compiling import compilations
from vr_jax.configs import base_config
from vr_jax.inference import bulk
from vr_jax.inference.options import Options
from vr_jax.inference.placement import parse_mesh
from vr_jax.inference.regions import Region
from vr_jax.inference.requests import Request, Turn
from vr_jax.interop.convert import convert
from vr_jax.interop.navit import config_json, model_slots, tower_json, tower_prefix
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import collect
from vr_jax.loading import load
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.crops import k_means
from vr_jax.models.layer import DecoderConfig
from vr_jax.models.navit import Navit, NavitConfig, kept_tokens
from vr_jax.models.region import RegionConfig
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig, init_params
from vr_jax.params import by_path
from vr_jax.parity import golden as parity
from vr_jax.parity.golden import FAIL, PASS, run_parity
from vr_jax.training.start import starting_params

GOLDEN = Path(__file__).parent / "golden/successors"
TOWER = NavitConfig(patch_size=14, width=16, depth=2, heads=2, mlp_dim=24, max_tokens=48)
LLM = DecoderConfig(
  width=24, depth=2, heads=2, kv_heads=1, head_dim=12, mlp_dim=32, vocab_size=1007,
  activation="silu", norm_plus_one=False, scale_embedding=False, qkv_bias=True, rope_base=1e6,
)  # fmt: skip
TOKENS = {"cells": 10, "placed_cells": 6, "cells_in_context": 4}
QUIET = {"report": lambda line: None}


def config(kind: str, tied: bool = True) -> VideoReferConfig:
  return VideoReferConfig(
    name=kind,
    img=TOWER,
    connector=ConnectorConfig("mlp2x_gelu", LLM.width),
    region=RegionConfig(LLM.width, TOKENS[kind], kind=kind),
    llm=dataclasses.replace(LLM, tied_head=tied),
    num_frames=12,
    image_aspect_ratio="any",
    max_text_ids=16384,
  )


def random_params(cfg: VideoReferConfig):
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32), shapes)


def publish(kind: str, made: Path) -> Path:
  """A published folder of a kind of region encoder, with random weights."""
  cfg = config(kind)
  shutil.copytree(GOLDEN / "data_side/tokenizer", made)
  params = random_params(cfg)
  shapes = {path: x.shape for path, x in by_path(params).items()}
  tensors = collect(params, model_slots(shapes, cfg, tower_prefix(kind)))
  if kind == "cells_in_context":
    tensors["model.region_encoder.mask_embedding.weight"] = np.ones((16, 1, 1, 1), np.float32)
  save_file(tensors, made / "model.safetensors")
  fields = config_json(cfg, {}, {"eos_ids": (1002, 1000), "pad_id": 1000}, "float32")
  (made / "config.json").write_text(json.dumps(fields))
  (made / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [1002, 1000], "pad_token_id": 1000, "repetition_penalty": 1.1})
  )
  tower = made / fields["mm_vision_encoder"]
  tower.mkdir(parents=True)
  for name, content in tower_json(TOWER).items():
    (tower / name).write_text(json.dumps(content))
  return made


@pytest.fixture(scope="module", params=list(TOKENS))
def folder(request, tmp_path_factory):
  return publish(request.param, tmp_path_factory.mktemp("published") / request.param)


def picture(h, w, merge=1, seed=0):
  rng = np.random.default_rng(seed)
  return Picture(rng.integers(0, 256, (h * w, 588)).astype(np.uint8), (h, w), merge)


# --- Golden cases -----------------------------------------------------------------------------


def test_golden_cases_pass_and_corrupted_ones_fail(tmp_path):
  results = run_parity(GOLDEN / "model_side")
  assert {r.status for r in results} == {PASS}, "\n".join(map(str, results))
  shutil.copytree(GOLDEN / "model_side", tmp_path / "broken")
  file = tmp_path / "broken/arrays/05_kmeans.npz"
  arrays = dict(np.load(file))
  arrays["lite_slow/y"] = arrays["lite_slow/y"] + np.float32(1e-4)
  np.savez(file, **arrays)
  results = run_parity(tmp_path / "broken", ["05_kmeans"])
  assert [r.case for r in results if r.status == FAIL] == ["lite_slow"]


def test_every_array_has_its_own_limits():
  (case,) = [
    c for c in parity.Golden(GOLDEN / "model_side").cases("05_kmeans") if c.id == "lite_slow"
  ]
  y = case.reference("y")
  for name in ("x", "init"):
    case[name]
  allowed = case.allowed("y")
  # Within atol everywhere, but over the bound of the root mean square.
  off = y + np.float32(0.9 * allowed["atol"])
  assert allowed["rms_tol"] < 0.9 * allowed["atol"]
  assert parity.compare(case, parity.Produced({"y": off})).status == FAIL


# --- Modules ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
  params = random_params(config("cells"))["img"]
  return jax.jit(lambda *row: Navit(TOWER).apply({"params": params}, *row)[0])


def test_a_picture_gives_the_same_in_any_row(tower):
  pictures = [picture(3, 5, seed=1), picture(4, 4, 2, seed=2), picture(1, 1, seed=3)]
  together = pack(pictures, (64,))
  (row,) = together.rows
  features = tower(*(x[None] for x in row))[0]
  for one in pictures:
    alone = pack([one], (64,))
    expected = tower(*(x[None] for x in alone.rows[0]))[0]
    at = together.start[id(one)]
    n = len(one.patches)
    np.testing.assert_allclose(features[at : at + n], expected[:n], atol=2e-5)


def test_positions_follow_the_order_of_the_patches(tower):
  blocks = picture(4, 6, 2)
  order = np.lexsort(blocks.positions().T[::-1])
  raster = Picture(blocks.patches[order], (4, 6))
  a, b = (tower(*(x[None] for x in pack([p], (64,)).rows[0]))[0, :24] for p in (blocks, raster))
  np.testing.assert_allclose(np.asarray(a)[order], b, atol=2e-5)


def test_a_frame_without_change_keeps_its_first_token():
  changes = jnp.array([1.1, 1.1, 0.05, 0.1, 0.0, 0.2, 5.0])
  frame = jnp.array([0, 0, 1, 1, 2, 2, -1])
  kept = kept_tokens(changes, frame)
  assert np.asarray(kept).tolist() == [True, True, True, False, False, True, False]


def test_k_means_keeps_the_centre_of_a_cluster_without_a_cell():
  x = jnp.array([[0.0], [0.0], [10.0], [12.0], [99.0]])
  valid = jnp.arange(5) < 4
  centres = k_means(x, valid, jnp.array([0, 1, 2]), 4)
  np.testing.assert_allclose(centres, [[0], [0], [11]])


def test_the_default_start_is_evenly_spaced():
  assert even_start(3, 5).tolist() == [0, 1, 2, 3, 4]
  assert even_start(40, 4).tolist() == [5, 15, 25, 35]
  assert len(set(even_start(11, 10))) == 10


def test_cells_are_interpolated_to_the_grid_of_the_mask():
  crop = Crop(picture(2, 2), np.ones((4, 4), np.uint8), box=(0, 0, 8, 4, 9, 9))
  cells = cells_of(crop)
  assert cells.patches[0].tolist()[0] == 0
  np.testing.assert_allclose(cells.weights.sum(-1), 1, atol=1e-6)
  rows = np.arange(4.0).reshape(2, 2).ravel()  # the features of the four patches
  values = (rows[cells.patches] * cells.weights).sum(-1).reshape(4, 4)
  np.testing.assert_allclose(values[0], [0, 0.25, 0.75, 1], atol=1e-6)
  np.testing.assert_allclose(values[:, 0], [0, 0.5, 1.5, 2], atol=1e-6)


def test_ids_that_do_not_fit_the_pictures_are_refused():
  ids = Ids(5, 6, 4)
  sample = Sample(np.array([1, 5, 5, 2]), np.full(4, -100), [picture(1, 3)])
  shape = needed_shape([[sample]], merge=2, tokens_per_object=4)
  with pytest.raises(InputError, match="2 <image> ids for 3 tokens"):
    build_row([sample], shape, ids)


# --- Folders ----------------------------------------------------------------------------------


def test_a_folder_goes_to_a_checkpoint_and_back(folder, tmp_path):
  assert convert(folder, tmp_path / "vr", "vr", **QUIET)["bit_identical"]
  assert convert(tmp_path / "vr", tmp_path / "out", "videorefer", **QUIET)["bit_identical"]
  a, b = (load_file(d / "model.safetensors") for d in (folder, tmp_path / "out"))
  assert a.keys() == b.keys()
  assert all(a[name].tobytes() == b[name].tobytes() for name in a)
  for name in ("config.json", "generation_config.json", "vocab.json"):
    assert json.loads((folder / name).read_text()) == json.loads(
      (tmp_path / "out" / name).read_text()
    )


def test_what_a_folder_is_shows_in_its_tensors(folder, tmp_path):
  kind = open_source(folder).parts["region"].kind
  shutil.copytree(folder, tmp_path / "plain")
  tensors = load_file(folder / "model.safetensors")
  rest = {name: x for name, x in tensors.items() if ".region_encoder." not in name}
  save_file(rest, tmp_path / "plain/model.safetensors")
  if kind == "cells":  # plain VideoLLaMA3 has the same model_type
    assert set(open_source(tmp_path / "plain").parts) == {"img", "connector", "llm"}
  else:
    with pytest.raises(InputError, match="no region encoder"):
      open_source(tmp_path / "plain")
  fields = json.loads((folder / "config.json").read_text())
  other = "pixelrefer_qwen2" if kind != "placed_cells" else "pixelreferlite_qwen2"
  shutil.copytree(folder, tmp_path / "other")
  (tmp_path / "other/config.json").write_text(json.dumps(fields | {"model_type": other}))
  with pytest.raises(InputError, match=f"model_type='{other}', but the tensors hold"):
    open_source(tmp_path / "other")


def test_formats_that_do_not_know_the_tower_are_refused(folder, tmp_path):
  with pytest.raises(InputError, match="--to big_vision does not know towers"):
    convert(folder, tmp_path / "out", "big_vision", **QUIET)


def parts_of(folder, where, kept):
  """The folder with only the tensors that `kept` takes."""
  shutil.copytree(folder, where)
  tensors = load_file(folder / "model.safetensors")
  save_file({n: x for n, x in tensors.items() if kept(n)}, where / "model.safetensors")
  return where


# What a folder is shows in its tensors; only this model_type may lack the region encoder.
@pytest.mark.parametrize("folder", ["cells"], indirect=True)
def test_training_starts_from_the_parts_of_others(folder, tmp_path):
  """Plain VideoLLaMA3 gives all but the region encoder, VL3-SigLIP-NaViT the tower."""
  cfg = config("cells")
  params, shapes = random_params(cfg), jax.eval_shape(lambda: random_params(cfg))
  plain = parts_of(folder, tmp_path / "plain", lambda name: ".region_encoder." not in name)
  tower = tmp_path / "tower"
  tower.mkdir()
  prefix = tower_prefix("cells")
  tensors = load_file(folder / "model.safetensors")
  alone = {n.removeprefix(prefix): x + 1 for n, x in tensors.items() if n.startswith(prefix)}
  save_file(alone, tower / "model.safetensors")
  (tower / "config.json").write_text(json.dumps(tower_json(TOWER)["config.json"]))
  given = base_config()
  given.model_init = tuple((part, str(plain)) for part in ("connector", "llm"))
  given.model_init += (("img", str(tower)),)
  started = starting_params(given, shapes)
  assert set(started) == {"img", "connector", "llm"}
  for part in ("connector", "llm"):
    jax.tree.map(np.testing.assert_array_equal, started[part], params[part])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), started["img"], params["img"])


# --- Answers ----------------------------------------------------------------------------------


# One kind: each costs seconds of compiling, and the golden set answers with all three.
@pytest.mark.parametrize("folder", ["placed_cells"], indirect=True)
def test_an_answer_is_that_of_the_model_alone(folder, tmp_path):
  rng = np.random.default_rng(3)
  image, mask = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8), np.zeros((40, 60), np.uint8)
  mask[8:30, 12:40] = 1
  Image.fromarray(image).save(tmp_path / "image.png")
  model = load(folder)
  request = Request(str(tmp_path / "image.png"), "What is <region>?", annotation=[{0: mask}])
  (answer,) = model.ask_many([request], max_new_tokens=1, batch_size=1)
  (group,) = model.reader(Options()).read([(0, request)])
  sample = group.questions[0].sample
  shape = needed_shape([[sample]], merge=2, tokens_per_object=model.cfg.region.tokens)
  row = {k: x[None] for k, x in build_row([sample], shape, model.ids).items()}
  cfg = open_source(folder).model_config()

  @jax.jit
  def logits(params, row):
    hidden, spliced = VideoRefer(cfg).apply({"params": params}, row)
    last = jnp.take(hidden[0], spliced.valid.sum() - 1, axis=0)
    return VideoRefer(cfg).apply({"params": params}, last, method="logits")

  assert answer.token_ids == (int(logits(random_params(cfg), row).argmax()),)
  assert [set(map(tuple, o["tokens"])) for o in answer.objects] == [{(0,)}]


@pytest.mark.parametrize("folder", ["cells_in_context"], indirect=True)
def test_a_model_without_scene_needs_an_object(folder, tmp_path, capsys):
  Image.new("RGB", (40, 60)).save(tmp_path / "image.png")
  command = ["ask", "--checkpoint", str(folder), "--video", str(tmp_path / "image.png")]
  assert cli.main([*command, "--question", "What is it?"]) == 2
  assert "accepted: at least one <region>" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A GIF of six frames that change, so that none of the scene is dropped."""
  path = tmp_path_factory.mktemp("clip") / "clip.gif"
  rng = np.random.default_rng(5)
  frames = [Image.fromarray(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)) for _ in range(6)]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
  return path


def questions(clip) -> list[Request]:
  """Three about one clip: of two objects at different times, of one, and of none."""
  boxes = [Region(box=(8, 8, 40, 30), frame=2), Region(box=(20, 4, 58, 24), frame=4)]
  return [
    Request(clip, "Is <region> left of <region>?", boxes),
    Request(clip, "What is <region>?", boxes[1:]),
    Request(clip, "What happens?"),
  ]


OPTIONS = {"max_new_tokens": 2, "batch_size": 2, "scene_frames": 3}


@pytest.fixture(scope="module")
def answering(folder, clip):
  """A model that has been warmed up for the clip."""
  model = load(folder)
  model.warm_up(media=[clip], **OPTIONS)
  return model


@pytest.mark.parametrize("folder", ["placed_cells"], indirect=True)
def test_questions_about_a_clip_see_it_once_and_compile_nothing(answering, clip, monkeypatch):
  decoded: list[int] = []
  animation = type(open_video(clip))
  read = animation._read
  monkeypatch.setattr(animation, "_read", lambda self, n: [decoded.extend(n), read(self, n)][1])
  answering.visual.forget()
  before = compilations()
  first = answering.ask_many(questions(clip), **OPTIONS)
  assert sorted(decoded) == [0, 2, 4, 5]
  assert answering.visual.counts["prefixes"] == 1
  assert answering.ask_many(questions(clip)[2:], **OPTIONS) == first[2:]
  assert sorted(decoded) == [0, 2, 4, 5]
  assert compilations() == before
  alone = [answering.ask_many([one], share=False, **OPTIONS)[0] for one in questions(clip)]
  assert alone == first
  assert [len(answer.objects) for answer in first] == [2, 1, 0]
  assert first[0].scene_frames == (0, 2, 5)


@pytest.mark.parametrize("folder", ["placed_cells"], indirect=True)
def test_requests_may_say_where_k_means_starts(answering, clip, tmp_path):
  """In Python and as lines of a file; what does not fit is refused alone."""
  request = questions(clip)[1]
  (group,) = answering.reader(Options(scene_frames=3)).read([(0, request)])
  even = list(even_start(group.questions[0].sample.objects[0].cells, 6))
  starts = [even, list(range(6)), even[:5], [0] * 6, [10**6, 1, 2, 3, 4, 5]]
  requests = [dataclasses.replace(request, starts=[start]) for start in starts]
  answers = dict(answering.answer_each([*requests, request], **OPTIONS))
  assert answers[0] == answers[5]
  assert "accepted: 6 different cells from 0 to" in str(answers[2])
  assert [isinstance(answers[i], InputError) for i in range(5)] == [False, False, True, True, True]
  line = {"video": str(clip), "question": request.question, "regions": ["box:20,4,58,24@4"]}
  lines = [{**line, "starts": [list(map(int, start))]} for start in (even, range(6))]
  (tmp_path / "requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
  bulk.run(lambda: answering, tmp_path / "requests.jsonl", tmp_path / "out.jsonl", **OPTIONS)
  written = [json.loads(one) for one in (tmp_path / "out.jsonl").read_text().splitlines()]
  expected = {answers[0].token_ids, answers[1].token_ids}
  assert {tuple(one["token_ids"]) for one in written} == expected
  for wrong in ("abc", [1], [["a"]], [[True]], 7):
    with pytest.raises(InputError, match="accepted: for each crop a list"):
      dataclasses.replace(request, starts=wrong)


@pytest.mark.parametrize("folder", ["placed_cells"], indirect=True)
def test_earlier_turns_and_questions_about_no_video_are_read(answering, clip):
  box = Region(box=(20, 4, 58, 24), frame=4, name="cat")
  turns = [Turn("What is <region>?", "A <|im_end|> cat.", [box])]
  request = Request(clip, "Is <region cat> red?", turns=turns, system="Be brief.")
  reader = answering.reader(Options(scene_frames=3, literal=True))
  (group,) = reader.read([(0, request)])
  sample = group.questions[0].sample
  text = answering.tokenizer.decode(sample.ids, skip_special=False)
  start, end = "<|im_start|>", "<|im_end|>"
  assert text.startswith(f"{start}system\nBe brief.{end}\n{start}user\nTime 0.0s:<image>")
  parts = [f"assistant\nA {end} cat.{end}\n", f"user\nIs [{'<REGION>' * 6}] red?{end}\n"]
  assert text.endswith(f"{start}{start.join(parts)}{start}assistant\n")
  # Of the controls one is text, tokens of its letters.
  assert list(sample.ids).count(answering.tokenizer.id_of(end)) == text.count(end) - 1
  (about_nothing,) = reader.read([(0, Request(None, "Why?"))])
  assert not about_nothing.questions[0].sample.pictures()


@pytest.mark.parametrize("folder", ["cells_in_context"], indirect=True)
def test_frames_on_which_an_annotated_object_is_not_seen_are_left_out(folder, clip):
  """Whatever form says so: None, an array, run lengths."""
  empty = {"size": [40, 60], "counts": [40 * 60]}
  seen = {"size": [40, 60], "counts": [500, 300, 1600]}
  reader = load(folder).reader(Options())
  masks = {0: seen, 1: empty, 2: None, 3: np.zeros((40, 60), np.uint8), 4: seen}
  (group,) = reader.read([(0, Request(clip, "What is <region>?", annotation=[masks]))])
  assert [list(o) for o in group.questions[0].objects] == [[0], [4]]


@pytest.mark.parametrize("folder", ["placed_cells"], indirect=True)
def test_an_object_that_vanishes_is_told(folder, tmp_path):
  """A line one pixel wide in a large picture, which shrinks: no cell by the published rule."""
  Image.new("RGB", (700, 700)).save(tmp_path / "image.png")
  mask = np.zeros((700, 700), np.uint8)
  mask[350, :] = 1
  mask[:, 350] = 1
  mask[:20, :20] = 0
  request = Request(tmp_path / "image.png", "What is <region>?", annotation=[{0: mask}])
  for rule in ("published", "keep"):
    (group,) = load(folder).reader(Options(mask_rule=rule)).read([(0, request)])
    (question,) = group.questions
    vanished = question.sample.objects[0].cells == 0
    assert vanished == (rule == "published")
    assert vanished == any("accepted: mask_rule keep" in line for line in question.warnings)


@pytest.mark.parametrize("folder", ["placed_cells"], indirect=True)
def test_pictures_that_do_not_fit_the_memory_are_refused_with_the_numbers(
  folder, clip, monkeypatch
):
  model = load(folder)
  monkeypatch.setattr(model.visual, "_limit", 1000)
  (answer,) = (answer for _, answer in model.answer_each(questions(clip)[2:], **OPTIONS))
  assert isinstance(answer, InputError)
  words = r"a tower row of 128 patches does not fit the memory: weights .* of 0\.0 MiB"
  assert re.search(words, str(answer))


@pytest.mark.parametrize(
  ("folder", "options"),
  [
    pytest.param("placed_cells", {"weights": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param("cells", {"weights": "int8"}, marks=pytest.mark.int8),
    pytest.param("cells", {"mesh": "data=2"}, marks=pytest.mark.slow),
    pytest.param("cells_in_context", {"mesh": "data=2"}, marks=pytest.mark.slow),
  ],
  indirect=["folder"],
)
def test_other_weights_and_meshes_answer(folder, options, clip):
  mesh = {"mesh": parse_mesh(options["mesh"])} if "mesh" in options else {}
  model = load(folder, **{**options, **mesh})
  answers = model.ask_many(questions(clip)[:2], **OPTIONS)
  if mesh:
    assert answers == load(folder).ask_many(questions(clip)[:2], **OPTIONS)
  assert model.weights == options.get("weights", "float32")
  assert all(answer.token_ids for answer in answers)
