"""Pre-training of vr-mini's decoder on words about simulated scenes, without pixels.

The decoder reads the dialogues of all stages. Where a video would put an object token stands a
linear map of the numbers that describe the thing at that time (`data_pipes.embedded.states`),
merged over time as the model merges object tokens; where it would put scene tokens stand some of
things and backdrop, a third of the time noise, which the decoder so learns to pass over. The map is
dropped afterwards: the stages learn to give the decoder the same from pixels.

Letters: B row, L slot, X visual token of the row, S state, E decoder width, N frame.
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

from data_pipes.embedded.dialogues import caption_dialogue, question_dialogue, scene_dialogue
from data_pipes.embedded.questions import Balance
from data_pipes.embedded.scenes import make_scene
from data_pipes.embedded.states import SLICES, STATE, thing_states
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
TIMES, SIDE = 4, 6  # scene tokens of a video: TIMES x SIDE x SIDE
SEEN = 8  # of them stand in a row at each time
NOISE, LOST = 0.05, 0.03  # of the states; share of frames in which a mask misses every patch
UNSEEN = 1 / 3  # of the rows about objects whose scene tokens tell nothing


class WordDecoder(nn.Module):
  """The decoder and the map from states to its inputs."""

  cfg: DecoderConfig

  def setup(self):
    self.llm = Decoder(self.cfg)
    self.states = nn.Dense(self.cfg.width)

  def __call__(self, rows: dict[str, Array]) -> tuple[Float[Array, "B L E"], Spliced]:
    """`rows`: tokens, visual (row of `states` or -1), positions i32 [B,L], states f32 [B,X,S]"""
    text = self.llm.embed(rows["tokens"])
    index = jnp.maximum(rows["visual"], 0)[..., None]
    objects = jnp.take_along_axis(self.states(rows["states"]), index, axis=1)
    embeds = jnp.where(rows["visual"][..., None] >= 0, objects, text)
    positions = rows["positions"]
    spliced = Spliced(embeds, rows["tokens"], rows["supervised"], positions >= 0, positions)
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


def scene_states(states: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Scene tokens for states [O, N, S] of all things: (states [TIMES * SEEN, S], places).

  Of the TIMES x SIDE x SIDE tokens of a video those where a thing's middle is, and backdrop, whose
  state is zero, to make SEEN at each time. `places` are their numbers in the video's order.
  """
  out, places = [], []
  for time in range(TIMES):
    now = states[:, (2 * time + 1) * states.shape[1] // (2 * TIMES)]
    at = {}
    for state in now[now.any(-1)]:
      column, row = (
        int(SIDE * (state[SLICES[axis]].argmax() + 0.5) / (SLICES[axis].stop - SLICES[axis].start))
        for axis in ("column", "row")
      )
      at[row * SIDE + column] = state
    free = rng.permutation([c for c in range(SIDE * SIDE) if c not in at])
    at |= dict.fromkeys(free[: SEEN - len(at)].tolist(), np.zeros(STATE))
    out += [at[cell] for cell in sorted(at)]
    places += [time * SIDE * SIDE + cell for cell in sorted(at)]
  return np.stack(out), np.array(places)


def dialogue_rows(start: int, tokenizer_folder: str, length: int) -> list[dict[str, np.ndarray]]:
  """The dialogues of CHUNK scenes from seed `start` on: ids, labels, things, states."""
  tokenizer = Tokenizer.from_folder(tokenizer_folder)
  rng, balance, rows = np.random.default_rng((start, 5)), Balance(start), []
  for seed in range(start, start + CHUNK):
    scene = make_scene(seed)
    if seed % 8 == 0:
      dialogue = scene_dialogue(scene)
    elif seed % 8 == 1:
      dialogue = caption_dialogue(scene, False, rng)
    else:
      questions, captions = ((2, 1), (3, 0), (1, 2))[seed % 3]
      dialogue = question_dialogue(scene, balance, rng, questions, captions)
    text = dialogue_text(dialogue.turns, tokenizer, "<video>")
    regions = (text.ids == tokenizer.region_id).sum()
    if len(text.ids) + (TOKENS - 1) * regions + TIMES * SEEN - 1 <= length:
      states = thing_states(scene).astype(np.float16)
      rows.append(
        {"ids": text.ids, "labels": text.labels, "things": dialogue.things, "states": states}
      )
  return rows


def lay_out(row: dict, length: int, region_id: int, rng: np.random.Generator) -> dict:
  """One dialogue as arrays of static shape, its scene and object tokens drawn anew.

  Positions are those that the text would have behind all scene tokens of a video.
  """
  out = {
    "tokens": np.zeros(length, np.int32),
    "visual": np.full(length, -1, np.int32),
    "states": np.zeros((OBJECTS * TOKENS + TIMES * SEEN, STATE), np.float32),
    "positions": np.full(length, -1, np.int32),
    "supervised": np.zeros(length, bool),
  }
  at = used = mention = position = 0
  states = row["states"].astype(np.float32)

  def put(x: np.ndarray, places: np.ndarray) -> None:
    nonlocal at, used, position
    out["states"][used : used + len(x)] = x + rng.normal(0, NOISE, x.shape)
    out["visual"][at : at + len(x)] = np.arange(used, used + len(x))
    out["positions"][at : at + len(x)] = position + places
    at, used = at + len(x), used + len(x)

  for k, label in zip(row["ids"], row["labels"], strict=True):
    if k == MEDIA_IDS["<video>"]:
      x, places = scene_states(states, rng)
      if rng.random() < UNSEEN and len(row["things"]):
        x = rng.normal(0, np.exp(rng.uniform(-2, 1)), x.shape)
      put(x, places)
      position += TIMES * SIDE * SIDE
    elif k == region_id:
      x = merged_states(states[row["things"][mention]], rng)
      mention += 1
      put(x, np.arange(len(x)))
      position += len(x)
    else:
      out["tokens"][at], out["supervised"][at] = k, label != IGNORE
      out["positions"][at] = position
      at, position = at + 1, position + 1
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
