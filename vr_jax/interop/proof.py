"""Logits of two models on one batch: ours on the source, PyTorch's on the result (or the reverse).

Where either side is a folder of `transformers`, its library runs it (and the library `peft` what
was merged); the published layout and our own PyTorch folder are run by the PyTorch model of
`torch_model/`, which has the same names.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from data_pipes.batch import Clip, Row, build_row, collate, fit_shape, needs
from data_pipes.navit_rows import Crop, Ids, Picture, Sample, needed_shape, tokens_of
from data_pipes.navit_rows import build_row as build_picture_row
from data_pipes.prompts import IGNORE, MEDIA_IDS, Text
from vr_jax.inference.generate import Generator
from vr_jax.interop import torch_folder
from vr_jax.interop.source import Source
from vr_jax.interop.table import Part, arrays, nested, outputs
from vr_jax.models.connector import Connector, scene_token_count
from vr_jax.models.decoder import Decoder
from vr_jax.models.siglip import Siglip
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig

TOLERANCE = {"float32": 1e-4, "half": 5e-2}  # of the largest logit
NEW_TOKENS = 32


def logits(
  source: Source, to: str, result: Path, mode: str = "auto", adapter: str | None = None
) -> dict[str, Any]:
  """Compares the two sides of a conversion; {"skipped": reason} where it cannot.

  Both run in float32, so that the difference is that of the code, and of the weights where they
  were cast. `adapter`: the PEFT folder that was merged into the source.
  """
  if mode == "never":
    return {"skipped": "not asked for"}
  reason = cannot(source, mode, adapter)
  if reason:
    return {"skipped": reason}
  parts = {}
  if set(source.parts) == {"img"} and source.parts["img"].kind == "navit":
    return {"skipped": "no other implementation of a tower for pictures of any size alone"}
  if source.whole and to in ("vr", "videorefer", "torch"):
    parts = _whole(source, to, result)
  elif to == "hf" and "llm" in source.parts and "connector" not in source.parts:
    parts = {"decoder": decoder_logits(source, result)}
  elif to == "hf" and set(source.parts) == {"img"}:
    parts = {"tower": tower_features(source, result)}
  elif to == "hf" and source.whole:
    parts = {
      "tower": tower_features(source, result / "tower"),
      "decoder": decoder_logits(source, result / "decoder"),
    }
  elif to == "hf" and _is_paligemma(source):
    parts = {"paligemma": paligemma_logits(source, result)}
  from_library = _of_library(source, to, result, adapter)
  if adapter and not from_library:
    return {"skipped": "a merge is compared over a decoder folder of transformers alone"}
  parts |= from_library
  if not parts:
    return {"skipped": f"no other implementation of {', '.join(source.parts)} as {to} is known"}
  parts["passed"] = all(part["passed"] for part in parts.values())
  return parts


def _of_library(source: Source, to: str, result: Path, adapter: str | None) -> dict[str, Any]:
  """The result, opened, against the library that wrote the source, on the source's own folder."""
  from vr_jax.interop.sources import open_source

  if to == "peft" or (to == "hf" and not adapter):  # there the library has read the result
    return {}
  if source.kind == "SigLIP folder":
    return {"source": tower_features(open_source(result), source.path)}
  if source.kind == "decoder folder":
    return {"source": decoder_logits(open_source(result), source.path, adapter)}
  if source.kind == "PaliGemma folder" and not adapter:
    return {"source": paligemma_logits(open_source(result), source.path)}
  return {}


def _is_paligemma(source: Source) -> bool:
  return set(source.parts) == {"img", "connector", "llm"} and source.parts["llm"].prefix_lm


def cannot(source: Source, mode: str, adapter: str | None = None) -> str | None:
  """Why the models are not run, None if they can be."""
  packages = ("torch", "transformers", "peft") if adapter else ("torch", "transformers")
  missing = [n for n in packages if importlib.util.find_spec(n) is None]
  if missing:
    return f"{', '.join(missing)} not installed (extra [torch])"
  if mode == "auto":
    size = sum(int(np.prod(shape)) for shape in source.params.shapes.values()) * 4
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * size > available:
      return f"both models need {4 * size / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
  return None


# --- The fixed batch --------------------------------------------------------------------------


def fixed_row(cfg: VideoReferConfig, seed: int = 0) -> Row:
  """A batch of two rows: a video of moving shapes with two objects, and one with another.

  The first object is seen on more frames than it keeps tokens of, the second on one.
  """
  if cfg.img.kind == "navit":
    return _fixed_pictures(cfg, seed)
  rng = np.random.default_rng(seed)
  size, grid, scene = cfg.img.image_size, cfg.img.grid, max(cfg.num_frames, 2)
  frames = {}
  for t in range(scene + 2):
    frame = rng.integers(0, 60, (size, size, 3))
    at = (size - size // 3) * t // (scene + 1)
    frame[at : at + size // 3, size // 4 : size // 2] += 120
    frame[size // 2 :, at : at + size // 4, 0] += 90
    frames[t] = frame.astype(np.uint8)
  cells = np.zeros((3, grid, grid), np.uint8)
  cells[0, : grid // 2 + 1, : grid // 2 + 1] = 1
  cells[1, grid // 2 :, grid // 2 :] = 1
  cells[2, :, grid // 3] = 1
  masks = cells.reshape(3, -1)
  many = {t: masks[t % 2] for t in range(scene + 2)}
  region_id = cfg.llm.vocab_size - 1
  texts, clips = [], []
  for objects in ([many, {1: masks[1]}], [{scene + 1: masks[2]}]):
    words = rng.integers(0, cfg.llm.vocab_size - 1, 24 + 3 * len(objects))
    ids = np.concatenate([words[:5], [MEDIA_IDS["<video>"]], words[5:9]])
    for k in range(len(objects)):
      ids = np.concatenate([ids, [region_id], words[9 + 3 * k : 12 + 3 * k]])
    ids = np.concatenate([ids, words[15:]]).astype(np.int32)
    texts.append(Text(ids, np.full_like(ids, IGNORE)))
    clips.append(Clip(frames, list(range(scene)), objects))
  shape = fit_shape(
    [needs(t, c, region_id) for t, c in zip(texts, clips, strict=True)],
    image_size=size,
    grid=grid,
    tokens_per_object=cfg.region.tokens,
    scene_tokens=scene_token_count(cfg.connector, scene, grid),
    scene=scene,
    length_multiple=8,
  )
  return collate([build_row(t, c, shape, region_id) for t, c in zip(texts, clips, strict=True)])


def _fixed_pictures(cfg: VideoReferConfig, seed: int) -> Row:
  """`fixed_row` for pictures of any size: a clip with an object of many cells and one of few, some
  frames of which hardly change, and an image with one object."""
  rng, s, K = np.random.default_rng(seed), cfg.img.merge, cfg.region.tokens
  lite = cfg.region.kind == "cells_in_context"
  values = 3 * cfg.img.patch_size**2
  image, region = cfg.llm.vocab_size - 2, cfg.llm.vocab_size - 1

  def picture(h: int, w: int, merge: int = 1) -> Picture:
    return Picture(rng.integers(0, 256, (h * w, values)).astype(np.uint8), (h, w), merge)

  def crop(h: int, w: int, cells: int) -> Crop:
    mask = (np.arange(h * w) < cells).reshape(h, w).astype(np.uint8)
    local, whole = (picture(2, 3), picture(3, 3)) if lite else (None, None)
    return Crop(picture(h, w), mask, (3, 5, 40, 60, 48, 64), local, whole)

  clip = [picture(2 * s, 2 * s, s) for _ in range(3)]
  clip.insert(2, Picture(clip[1].patches.copy(), clip[1].grid, s))
  still, side = [picture(3, 5)], math.isqrt(2 * K) + 2
  samples = []
  for scene, crops in ((clip, [crop(side, side, 2 * K), crop(3, 4, 2)]), (still, [crop(4, 4, 9)])):
    scene = [] if lite else scene
    words = rng.integers(0, cfg.llm.vocab_size - 2, (4, 6))
    ids = [words[0], np.full(sum(p.tokens for p in scene), image), words[1]]
    for i, one in enumerate(crops):
      ids += [np.full(tokens_of(one, K), region), words[2 + i]]
    joined = np.concatenate(ids).astype(np.int32)
    video = len(scene) > 1
    samples.append(Sample(joined, np.full_like(joined, IGNORE), scene, crops, video))
  shape = needed_shape([[sample] for sample in samples], merge=s, tokens_per_object=K)
  rows = [build_picture_row([sample], shape, Ids(image, region, K)) for sample in samples]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "segments"}


def differences(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> dict[str, Any]:
  """Largest difference, absolute and of the largest value."""
  largest = float(np.abs(ours.astype(np.float64) - theirs).max())
  relative = largest / max(float(np.abs(theirs).max()), 1e-30)
  return {
    "max_abs": largest,
    "relative": relative,
    "tolerance": tolerance,
    "passed": relative <= tolerance,
  }


def logit_differences(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> dict[str, Any]:
  """`differences`, the largest KL of a slot in nats, and how often the best token is the same."""

  def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  a, b = log_softmax(ours), log_softmax(theirs)
  return differences(ours, theirs, tolerance) | {
    "kl": float((np.exp(a) * (a - b)).sum(-1).max()),
    "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
  }


# --- Whole models -----------------------------------------------------------------------------


def _whole(source: Source, to: str, result: Path) -> dict[str, Any]:
  """Our model on one side and the PyTorch model on the other, on the fixed batch."""
  from vr_jax.interop.sources import open_source

  cfg = source.model_config()
  back = open_source(result)
  # PyTorch runs the foreign side; where both are ours, the result.
  ours, theirs = (back, source) if to == "vr" else (source, back)
  params = nested(arrays(ours.params, "float32"))
  model = VideoRefer(ours.model_config())
  row = fixed_row(cfg)
  rows = jax.tree.map(jnp.asarray, row)

  @jax.jit
  def forward(params, rows):
    hidden, spliced = model.apply({"params": params}, rows)
    return model.apply({"params": params}, hidden, method="logits"), spliced.valid

  with jax.default_matmul_precision("highest"):
    our_logits, valid = (np.asarray(x) for x in forward(params, rows))
    generated, _ = Generator(model, params)(rows, max_new_tokens=NEW_TOKENS, eos_ids=(), pad_id=0)
  with torch_model(theirs) as (torch, module):
    inputs = torch_inputs(torch, row)
    with torch.no_grad():
      their_logits = module(**inputs).logits.numpy()
    tokens = module.generate(
      **inputs, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0, eos_token_id=[]
    ).numpy()
  differ = logit_differences(our_logits[valid], their_logits[valid], _tolerance(source, back))
  same = [int(n) for n in (generated == tokens).cumprod(1).sum(1)]
  differ |= {"greedy_tokens": NEW_TOKENS, "greedy_equal": min(same)}
  return {"videorefer": differ}


def _tolerance(source: Source, result: Source) -> float:
  """The tolerance of arithmetic alone where both sides have the same dtypes, else of a cast."""
  both = source.params.shapes.keys() & result.params.shapes.keys()
  same = all(source.params.dtype(path) == result.params.dtype(path) for path in both)
  return TOLERANCE["float32" if same else "half"]


def _merged_tolerance(source: Source) -> float:
  """That of a cast where merged matrices were rounded to less than float32."""
  kinds = {source.params.dtype(path) for path in source.params.shapes}
  return TOLERANCE["float32" if kinds == {np.dtype(np.float32)} else "half"]


def torch_inputs(torch: Any, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """A row as the inputs of the PyTorch model."""
  names = {"tokens": "input_ids", "valid": "attention_mask"}
  tensors = {names.get(k, k): torch.from_numpy(np.array(v)) for k, v in row.items()}
  tensors.pop("supervised")
  kept = (torch.uint8, torch.bool, torch.float32)
  return {k: v if v.dtype in kept else v.long() for k, v in tensors.items()}


@contextlib.contextmanager
def torch_model(source: Source) -> Iterator[tuple[Any, Any]]:
  """(torch, our PyTorch model in float32 with the weights of a whole source)."""
  import torch

  cfg = source.model_config()
  with tempfile.TemporaryDirectory() as folder:
    package = Path(folder, "videorefer_torch_model")
    package.mkdir()
    for name, content in torch_folder.code(cfg.img.kind).items():
      (package / name).write_bytes(content)
    sys.path.insert(0, folder)
    try:
      for name in [n for n in sys.modules if n.startswith(package.name)]:
        del sys.modules[name]
      file, name = torch_folder.CLASSES[cfg.img.kind][0].split(".")
      code = importlib.import_module(f"{package.name}.{file}")
      config = importlib.import_module(f"{package.name}.configuration_videorefer")
    finally:
      sys.path.remove(folder)
    fields = json.loads(json.dumps(cfg.to_dict()))
    module = getattr(code, name)(config.VideoReferConfig(videorefer=fields)).float().eval()
    state = module.state_dict()
    shapes = source.params.shapes
    for output in outputs(torch_folder.output_slots(cfg, shapes), shapes):
      value = np.array(output.make(source.params).astype(np.float32))
      state.pop(output.name).copy_(torch.from_numpy(value))
    if state:
      raise AssertionError(f"the PyTorch model has more parameters: {', '.join(state)}")
    yield torch, module


# --- Towers and decoders of transformers ------------------------------------------------------


def tower_features(source: Source, folder: Path) -> dict[str, Any]:
  """The tower's output (and its pooled one) on random pictures against SiglipVisionModel."""
  import torch
  import transformers

  from vr_jax.interop.sources import open_source

  cfg = source.parts["img"]
  params = nested(arrays(Part(source.params, "img/"), "float32"))
  pixels = np.random.default_rng(0).uniform(-1, 1, (2, cfg.image_size, cfg.image_size, 3))
  pixels = pixels.astype(np.float32)
  with jax.default_matmul_precision("highest"):
    ours, more = Siglip(cfg).apply({"params": params}, jnp.asarray(pixels))
  module = transformers.SiglipVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    out = module(
      torch.from_numpy(rearrange(pixels, "b h w c -> b c h w")), output_hidden_states=True
    )
  theirs = (
    out.last_hidden_state if cfg.select_layer is None else out.hidden_states[cfg.layers]
  ).numpy()
  tolerance = _tolerance(source, open_source(folder))
  compared = differences(np.asarray(ours), theirs, tolerance)
  if cfg.pool and out.pooler_output is not None:
    pooled = differences(np.asarray(more["pooled"]), out.pooler_output.numpy(), tolerance)
    return max(compared, pooled, key=lambda part: part["relative"])
  return compared


def paligemma_logits(source: Source, folder: Path) -> dict[str, Any]:
  """Logits of a picture, a prefix that sees itself whole and a suffix, against
  PaliGemmaForConditionalGeneration."""
  import torch
  import transformers

  from vr_jax.interop.sources import open_source

  module = transformers.AutoModelForImageTextToText.from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation="eager",  # the others drop Gemma 2's soft cap
  ).eval()
  img, connector, llm = (source.parts[part] for part in ("img", "connector", "llm"))
  llm = dataclasses.replace(llm, dtype="float32")
  params = nested(arrays(source.params, "float32"))
  rng = np.random.default_rng(0)
  pixels = rng.uniform(-1, 1, (1, img.image_size, img.image_size, 3)).astype(np.float32)
  picture = module.config.image_token_id
  words = rng.integers(0, llm.vocab_size - 1, (1, 14))
  words += words >= picture  # no word is the picture's id
  slots, prefix = img.grid**2, img.grid**2 + 4

  @jax.jit
  def forward(params, pixels, words):
    decoder = Decoder(llm)
    features, _ = Siglip(img).apply({"params": params["img"]}, pixels)
    scene = Connector(connector).apply({"params": params["connector"]}, features[:, None])
    text = decoder.apply({"params": params["llm"]}, words, method="embed")
    x = jnp.concatenate([scene, text], 1)
    positions = jnp.arange(x.shape[1])[None]
    seen = jnp.array([prefix])
    hidden, _ = decoder.apply({"params": params["llm"]}, x, positions, prefix=seen)
    return decoder.apply({"params": params["llm"]}, hidden, method="logits")

  with jax.default_matmul_precision("highest"):
    ours = np.asarray(forward(params, jnp.asarray(pixels), jnp.asarray(words)))
  ids = torch.cat([torch.full((1, slots), picture), torch.from_numpy(words).long()], 1)
  with torch.no_grad():
    theirs = module(
      input_ids=ids,
      pixel_values=torch.from_numpy(rearrange(pixels, "b h w c -> b c h w")),
      attention_mask=torch.ones_like(ids),
      token_type_ids=(torch.arange(ids.shape[1]) >= prefix).long()[None],
    ).logits.numpy()
  return logit_differences(ours, theirs, _tolerance(source, open_source(folder)))


def decoder_logits(source: Source, folder: Path, adapter: str | None = None) -> dict[str, Any]:
  """The decoder's logits on random text against AutoModelForCausalLM, and greedy tokens.

  `adapter`: a PEFT folder that the library peft puts over the model of `folder`.
  """
  import torch
  import transformers

  from vr_jax.interop.sources import open_source

  cfg = dataclasses.replace(source.parts["llm"], dtype="float32")
  params = nested(arrays(Part(source.params, "llm/"), "float32"))
  tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 24)).astype(np.int32)
  decoder = Decoder(cfg)

  def forward(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.apply(
      {"params": params}, decoder.apply({"params": params}, tokens, method="embed"), positions
    )
    return decoder.apply({"params": params}, hidden, method="logits")

  with jax.default_matmul_precision("highest"):
    ours = np.asarray(jax.jit(forward)(params, jnp.asarray(tokens)))
    batch = {"tokens": jnp.asarray(tokens), "valid": jnp.ones(tokens.shape, bool)}
    generated, _ = Generator(decoder, params)(batch, max_new_tokens=NEW_TOKENS, eos_ids=())
  module = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  tolerance = _tolerance(source, open_source(folder))
  if adapter is not None:
    import peft

    module = peft.PeftModel.from_pretrained(module, adapter).eval()
    tolerance = _merged_tolerance(source)
  ids = torch.from_numpy(tokens).long()
  with torch.no_grad():
    theirs = module(ids).logits.numpy()
    new = []
    for _ in range(NEW_TOKENS):
      new.append(module(ids).logits[:, -1].argmax(-1))
      ids = torch.cat([ids, new[-1][:, None]], 1)
  differ = logit_differences(ours, theirs, tolerance)
  same = (generated == torch.stack(new, 1).numpy()).cumprod(1).sum(1)
  return differ | {"greedy_tokens": NEW_TOKENS, "greedy_equal": int(same.min())}
