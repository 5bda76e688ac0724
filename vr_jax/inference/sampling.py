"""From logits to the next token: greedy, temperature, top-k, top-p, repetition penalty.

Letters: B row, W vocabulary. The order is that of `transformers`: penalty, temperature, k, p.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  temperature 0 is greedy; top_k 0 and top_p 1 keep every token. `repetition_penalty` falls on
  generated tokens only, never on the prompt, and holds for greedy decoding too.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    for name, ok, accepted in (
      ("temperature", self.temperature >= 0, "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (off) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
      ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
    ):
      if not ok:
        raise ValueError(f"{name}={getattr(self, name)} is not accepted; give {accepted}")


def penalize(
  logits: Float[Array, "B W"], seen: Bool[Array, "B W"], penalty: float
) -> Float[Array, "B W"]:
  """Makes seen tokens less likely (CTRL, arXiv 1909.05858, section 4.1)."""
  return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def pick(logits: Float[Array, "B W"], keys: Array, sampling: Sampling) -> Int[Array, " B"]:
  """The next token of each row; `keys` [B] are the rows' own, so a row's draw is its alone."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  W = logits.shape[-1]
  logits = logits / sampling.temperature
  kept = min(sampling.top_k, W) if sampling.top_k else W
  if kept == W and sampling.top_p == 1:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
  logits, tokens = jax.lax.top_k(logits, kept)
  if sampling.top_p < 1:
    probabilities = jax.nn.softmax(logits, axis=-1)
    better = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens before it
    logits = jnp.where(better < sampling.top_p, logits, -jnp.inf)
  drawn = jax.vmap(jax.random.categorical)(keys, logits)
  return jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
