"""From logits to the next token: greedy, temperature, top-k, top-p, repetition penalty.

Letters: B row, W vocabulary. The order is that of `transformers`: penalty, temperature, k, p. All
of it is data of the rows, so that no choice of a caller compiles a program.
"""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# The likeliest tokens that top-k and top-p choose among. To sort all words takes 1.2 s a step for 8
# rows of 151 647 on a CPU, this window 10 to 15 ms.
WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  temperature 0 is greedy; top_k 0 and top_p 1 keep every token, other values at most the WINDOW
  likeliest. `repetition_penalty` falls on generated tokens only, never on the prompt, and holds for
  greedy decoding too. `scored`: log-probabilities are noted.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  scored: bool = False

  def __post_init__(self):
    for name, ok, accepted in (
      ("temperature", self.temperature >= 0, "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (off) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
      ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
    ):
      if not ok:
        raise ValueError(f"{name}={getattr(self, name)} is not accepted; give {accepted}")

  def rows(self, count: int) -> "RowSampling":
    """The same for so many rows."""
    return RowSampling(
      np.full(count, self.temperature, np.float32),
      np.full(count, self.top_k, np.int32),
      np.full(count, self.top_p, np.float32),
      np.full(count, self.repetition_penalty, np.float32),
      np.full(count, self.scored, bool),
    )


@flax.struct.dataclass
class RowSampling:
  """`Sampling` of each row, as arrays."""

  temperature: Float[Array | np.ndarray, " B"]
  top_k: Int[Array | np.ndarray, " B"]
  top_p: Float[Array | np.ndarray, " B"]
  penalty: Float[Array | np.ndarray, " B"]
  scored: Bool[Array | np.ndarray, " B"]


def penalize(
  logits: Float[Array, "B W"],
  seen: Bool[Array, "B W"],
  penalty: float | Float[Array, "#B 1"],
) -> Float[Array, "B W"]:
  """Makes seen tokens less likely (CTRL, arXiv 1909.05858, section 4.1)."""
  return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def pick(logits: Float[Array, "B W"], keys: Array, sampling: RowSampling) -> Int[Array, " B"]:
  """The next token of each row; `keys` [B] are the rows' own, so a row's draw is its alone."""
  hot = sampling.temperature > 0
  narrow = hot & ((sampling.top_k > 0) | (sampling.top_p < 1))
  likeliest = jnp.argmax(logits, axis=-1)

  def drawn():
    scaled = logits / jnp.where(hot, sampling.temperature, 1)[:, None]
    token = jax.vmap(jax.random.categorical)(keys, scaled)
    chosen = jax.lax.cond(
      narrow.any(),
      lambda: jnp.where(narrow, _pick_in_window(scaled, keys, sampling), token),
      lambda: token,
    )
    return jnp.where(hot, chosen, likeliest)

  # Most rows are greedy; the draw over all words would cost them as much as the logits did.
  return jax.lax.cond(hot.any(), drawn, lambda: likeliest).astype(jnp.int32)


def _pick_in_window(
  logits: Float[Array, "B W"], keys: Array, sampling: RowSampling
) -> Int[Array, " B"]:
  """A token of the likeliest of each row, which top_k and top_p narrow further."""
  W = logits.shape[-1]
  top, tokens = jax.lax.top_k(logits, min(WINDOW, W))
  limited = sampling.top_k > 0
  kept = jnp.where(limited, sampling.top_k, W)[:, None] > jnp.arange(top.shape[-1])
  top = jnp.where(kept, top, -jnp.inf)
  # Mass is a share of what top_k leaves; without it, of all words.
  total = jnp.where(limited, jax.nn.logsumexp(top, axis=-1), jax.nn.logsumexp(logits, axis=-1))
  mass = jnp.exp(top - total[:, None])
  better = jnp.cumsum(mass, axis=-1) - mass  # of the tokens before it
  top = jnp.where(better < sampling.top_p[:, None], top, -jnp.inf)
  # A key gives token i the same noise whatever the number of tokens, so the window changes no draw.
  rank = jax.vmap(jax.random.categorical)(keys, top)
  return jnp.take_along_axis(tokens, rank[:, None], axis=1)[:, 0]
