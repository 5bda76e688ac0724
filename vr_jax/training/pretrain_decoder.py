"""Pre-training of vr-mini's decoder on words about simulated scenes, without pixels.

The decoder reads the dialogues of all stages. Where a video would put an object token stands a
linear map of the numbers that describe the thing at that time (`data_pipes.embedded.states`),
merged over time as the model merges object tokens. The map is dropped afterwards: stage 2 learns
to give the decoder the same from pixels.

Letters: B row, L slot, X object token of the row, S state, E decoder width, N frame.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from data_pipes.embedded.dialogues import lookup_dialogue, question_dialogue
from data_pipes.embedded.questions import Balance
from data_pipes.embedded.scenes import make_scene
from data_pipes.embedded.states import STATE, thing_states
from data_pipes.frame_rules import grid_frames
from data_pipes.prompts import IGNORE, MEDIA_IDS, dialogue_text
from data_pipes.tokenizer import Tokenizer
from vr_jax.models.decoder import Decoder, DecoderConfig
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import Spliced
from vr_jax.training.loss import model_loss
from vr_jax.training.start import starting_params
from vr_jax.training.task import Task

TOKENS = 4  # object tokens kept by the temporal merge
OBJECTS = 12  # mentions of things in a dialogue
CHUNK = 64  # scenes that share a Balance, so that any part of the set can be made alone
NOISE, LOST = 0.05, 0.03  # of the states; share of frames in which a mask misses every patch


class WordDecoder(nn.Module):
  """The decoder and the map from states to its inputs."""

  cfg: DecoderConfig

  def setup(self):
    self.llm = Decoder(self.cfg)
    self.states = nn.Dense(self.cfg.width)

  def __call__(self, rows: dict[str, Array]) -> tuple[Float[Array, "B L E"], Spliced]:
    """`rows`: tokens, visual i32 [B,L] (row of `states` or -1), states f32 [B,X,S], valid, ..."""
    text = self.llm.embed(rows["tokens"])
    index = jnp.maximum(rows["visual"], 0)[..., None]
    objects = jnp.take_along_axis(self.states(rows["states"]), index, axis=1)
    embeds = jnp.where(rows["visual"][..., None] >= 0, objects, text)
    positions = jnp.where(rows["valid"], jnp.arange(text.shape[1]), -1).astype(jnp.int32)
    spliced = Spliced(embeds, rows["tokens"], rows["supervised"], rows["valid"], positions)
    hidden, _ = self.llm(embeds, positions)
    return hidden, spliced

  def logits(self, hidden: Float[Array, "... E"]) -> Float[Array, "... W"]:
    return self.llm.logits(hidden)


def merged_states(states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """What the object tokens of a thing stand for: states [K, S], K <= 4, of states [N, S].

  Half of the time a single frame in which the thing is seen; else 8 to 32 frames of the mask grid
  in runs of similar ones, as the temporal token merge makes them.
  """
  states = states * (rng.random(len(states)) > LOST)[:, None]
  seen = np.flatnonzero(states.any(-1))
  if rng.random() < 0.5 and len(seen):
    return states[rng.choice(seen)][None]
  frames = np.array(grid_frames(len(states)))
  count = int(rng.choice([8, 8, 16, len(frames)]))
  x = states[frames[np.arange(count) * len(frames) // count]]
  scale = np.exp(rng.normal(0, 0.5, STATE))  # unlike the tower's features, and each time another
  y = x * scale + rng.normal(0, 0.3, STATE) * x.any(-1, keepdims=True)
  y = y / np.maximum(np.linalg.norm(y, axis=-1, keepdims=True), 1e-6)
  cuts = np.sort(np.argsort((y[1:] * y[:-1]).sum(-1), kind="stable")[: TOKENS - 1]) + 1
  return np.stack([part.mean(0) for part in np.split(x, cuts)])


def dialogue_rows(start: int, tokenizer_folder: str, length: int) -> list[dict[str, np.ndarray]]:
  """The dialogues of CHUNK scenes from seed `start` on: ids, labels, things, states."""
  tokenizer = Tokenizer.from_folder(tokenizer_folder)
  rng, balance, rows = np.random.default_rng((start, 5)), Balance(start), []
  for seed in range(start, start + CHUNK):
    scene = make_scene(seed)
    questions, captions = ((2, 1), (3, 0), (1, 2), (0, 0))[seed % 4]
    if questions:
      dialogue = question_dialogue(scene, balance, rng, questions, captions, letters=True)
    else:
      dialogue = lookup_dialogue(scene, balance)
    text = dialogue_text(dialogue.turns, tokenizer, "<video>")
    keep = text.ids != MEDIA_IDS["<video>"]
    ids, labels = text.ids[keep], text.labels[keep]
    regions = np.flatnonzero(ids == tokenizer.region_id)
    if len(ids) + (TOKENS - 1) * len(regions) <= length:
      states = thing_states(scene).astype(np.float16)
      rows.append({"ids": ids, "labels": labels, "things": dialogue.things, "states": states})
  return rows


def lay_out(row: dict, length: int, region_id: int, rng: np.random.Generator) -> dict:
  """One dialogue as arrays of static shape, its object tokens drawn anew."""
  out = {
    "tokens": np.zeros(length, np.int32),
    "visual": np.full(length, -1, np.int32),
    "states": np.zeros((OBJECTS * TOKENS, STATE), np.float32),
    "valid": np.zeros(length, bool),
    "supervised": np.zeros(length, bool),
  }
  at = used = mention = 0
  states = row["states"].astype(np.float32)
  for k, label in zip(row["ids"], row["labels"], strict=True):
    if k == region_id:
      x = merged_states(states[row["things"][mention]], rng)
      mention += 1
      out["states"][used : used + len(x)] = x + rng.normal(0, NOISE, x.shape)
      out["visual"][at : at + len(x)] = np.arange(used, used + len(x))
      at, used = at + len(x), used + len(x)
    else:
      out["tokens"][at], out["supervised"][at] = k, label != IGNORE
      at += 1
  out["valid"][:at] = True
  return out


def decoder_task(config: ConfigDict) -> Task:
  """The task of configs/mini_decoder.py: dialogues of `config.corpus` scenes, laid out anew."""
  cfg = get_variant(config.model_name)
  folder, length = str(config.tokenizer), config.input.row_length
  region_id = Tokenizer.from_folder(folder).region_id
  starts = range(config.corpus_seed, config.corpus_seed + config.corpus, CHUNK)
  with ProcessPoolExecutor(config.input.threads, get_context("spawn")) as pool:
    arguments = (starts, [folder] * len(starts), [length] * len(starts))
    corpus = [row for chunk in pool.map(dialogue_rows, *arguments) for row in chunk]
  model, B = WordDecoder(cfg.llm), config.input.batch_size

  def batch(position: int) -> dict[str, np.ndarray]:
    epoch, at = divmod(position * B, len(corpus) // B * B)
    order = np.random.default_rng((config.seed, epoch)).permutation(len(corpus))
    rng = np.random.default_rng((config.seed, position, 1))
    rows = [lay_out(corpus[i], length, region_id, rng) for i in order[at : at + B]]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

  def batches(position: int, total_steps: int) -> Iterator[dict[str, np.ndarray]]:
    return (batch(p) for p in range(position, total_steps))

  return Task(
    init=lambda key: model.init(key, jax.tree.map(jnp.asarray, batch(0)))["params"],
    loss=model_loss(model, config.loss_budget, config.loss_chunk),
    data_size=len(corpus),
    batches=batches,
    model=cfg.to_dict(),
    start=lambda shapes: starting_params(config, shapes),
    fields=("corpus", "corpus_seed"),
  )
