"""Small folders of other libraries, with what those compute from them: every row of the tables is
needed, and a wrong one shows (tests/foreign/record.py wrote them)."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from einops import rearrange

from vr_jax.interop import hf_decoder, hf_tower
from vr_jax.interop.fields import read_config
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import Part, Transform, arrays, nested
from vr_jax.models.decoder import Decoder
from vr_jax.models.siglip import Siglip

FOREIGN = Path(__file__).parent / "foreign"
DECODERS = ["qwen2", "qwen2_all_heads", "gemma", "gemma2", "gemma3"]
TOLERANCE = 1e-4  # of the largest number that was recorded


@functools.cache
def decoder_of(cfg):
  """The logits of a decoder as one program: (parameters, tokens) -> [B,L,W]."""
  decoder = Decoder(cfg)

  def logits(params, tokens):
    x = decoder.apply({"params": params}, tokens, method="embed")
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.apply({"params": params}, x, positions)
    return decoder.apply({"params": params}, hidden, method="logits")

  return jax.jit(logits)


@functools.cache
def tower_of(cfg):
  return jax.jit(lambda params, pixels: Siglip(cfg).apply({"params": params}, pixels))


def differs(name, recorded):
  """How far what we compute from a folder is from what its library computed."""
  source = open_source(FOREIGN / name)
  part = "img" if name == "siglip" else "llm"
  params = nested(arrays(Part(source.params, f"{part}/"), "float32"))
  with jax.default_matmul_precision("highest"):
    if part == "llm":
      pairs = [(decoder_of(source.parts["llm"])(params, recorded["tokens"]), recorded["logits"])]
    else:
      features, more = tower_of(source.parts["img"])(params, recorded["pixels"])
      pairs = [(features, recorded["features"]), (more["pooled"], recorded["pooled"])]
  return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)


@pytest.fixture(params=[*DECODERS, "siglip"])
def case(request):
  return request.param, dict(np.load(FOREIGN / request.param / "recorded.npz"))


def test_what_their_library_computes_is_what_we_compute(case):
  assert differs(*case) < TOLERANCE


def wrong_transforms(row):
  """The row with its transform spoilt, in ways that leave the shape as it is."""
  load, save = row.transform
  yield row._replace(transform=Transform(lambda x, shape: load(np.flip(x), shape), save))
  yield row._replace(transform=Transform(lambda x, shape: load(x, shape) * 0, save))
  yield row._replace(transform=Transform(lambda x, shape: turned(load(x, shape)), save))


def turned(x):
  """Of the last two equal axes, transposed; else heads and width mixed up."""
  if x.ndim < 2 or 1 in x.shape[-2:]:
    return np.roll(x, 1)
  if x.shape[-1] == x.shape[-2]:
    return np.swapaxes(x, -1, -2)
  flat = rearrange(x, "... a b -> ... (b a)")
  return flat.reshape(x.shape)


def wrong_names(row, rows):
  """The row with its names in another order, or with the name of the next row."""
  if not isinstance(row.theirs, str):
    yield row._replace(theirs=row.theirs[::-1])
  else:  # (any other is refused in the same way: the row's own tensor is then left over)
    yield row._replace(theirs=rows[(rows.index(row) + 1) % len(rows)].theirs)


def mutants(rows, used):
  """Tables with one wrong row that the model uses; names of which, for messages."""
  for i, row in enumerate(rows):
    if row not in used or row.ours.endswith("key/bias"):
      continue  # (a softmax over keys is the same whatever is added to all of them)
    wrong = [*wrong_transforms(row), *wrong_names(row, rows)]
    if row.part is not None:
      wrong += [row._replace(part=part) for part in range(3) if part != row.part]
    for number, other in enumerate(wrong):
      yield f"{row.ours} {number}", [*rows[:i], other, *rows[i + 1 :]]


def used_rows(rows, shapes):
  """The rows that some parameter of a model takes."""
  taken = [next(row for row in rows if re.fullmatch(row.ours, path)) for path in shapes]
  return [row for row in rows if row in taken]


def test_every_single_wrong_row_of_a_table_is_caught(case, monkeypatch):
  name, recorded = case
  fields = read_config(FOREIGN / name / "config.json")
  if name == "siglip":
    cfg = hf_tower.tower_config(fields, "", None, pool=True)
    rows, shapes = hf_tower.ROWS, hf_tower.tower_shapes(cfg)
  else:
    cfg = hf_decoder.decoder_config(fields, "")
    rows, shapes = hf_decoder.rows(cfg), hf_decoder.decoder_shapes(cfg)
  survived, count = [], 0
  for what, table in mutants(rows, used_rows(rows, shapes)):
    if name == "siglip":
      monkeypatch.setattr(hf_tower, "ROWS", table)
    else:
      monkeypatch.setattr(hf_decoder, "rows", lambda cfg, table=table: table)
    count += 1
    try:
      if differs(name, recorded) < 10 * TOLERANCE:
        survived.append(what)
    except Exception:
      continue  # it does not even open
  assert count >= 4 * len(used_rows(rows, shapes)) - 8
  assert survived == []


def test_every_row_of_the_tables_is_used_by_one_of_the_folders():
  used, rows = set(), []
  for name in DECODERS:
    cfg = hf_decoder.decoder_config(read_config(FOREIGN / name / "config.json"), name)
    used |= {row.ours for row in used_rows(hf_decoder.rows(cfg), hf_decoder.decoder_shapes(cfg))}
    rows += hf_decoder.rows(cfg)
  assert used == {row.ours for row in rows}
  fields = read_config(FOREIGN / "siglip/config.json")
  cfg = hf_tower.tower_config(fields, "siglip", None, pool=True)
  assert used_rows(hf_tower.ROWS, hf_tower.tower_shapes(cfg)) == hf_tower.ROWS
