"""The decoder's token table and head, on one device or spread over a mesh.

Letters: B batch, L slot, D width, W vocabulary, C rows of a piece of the table.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from vr_jax.arrays import Array
from vr_jax.models.layer import DecoderConfig, scaled_by, widened
from vr_jax.sharding import ActivationRules, shard_act

LOOKUP_CHUNK = 16_384  # rows of the token table that are whole on a device at a time


def lookup(
  table: Float[Array, "W D"], tokens: Int[Array, "B L"], rules: ActivationRules
) -> Float[Array, "B L D"]:
  """`table[tokens]`. A table that lies spread over a mesh is gathered a chunk at a time, so that
  neither it nor its gradient is ever whole on a device."""
  W, C = len(table), LOOKUP_CHUNK
  if not rules or W <= C:
    return whole(table, rules)[tokens]

  def add(x, first):
    start = jnp.minimum(first, W - C)  # the last chunk overlaps the one before it
    part = whole(jax.lax.dynamic_slice_in_dim(table, start, C), rules)
    here = (tokens >= first) & (tokens < start + C)
    rows = part[jnp.clip(tokens - start, 0, C - 1)]
    return shard_act(x + jnp.where(here[..., None], rows, 0), rules, "batch", None, None), None

  zeros = jnp.zeros((*tokens.shape, table.shape[1]), table.dtype)
  return jax.lax.scan(add, shard_act(zeros, rules, "batch", None, None), jnp.arange(0, W, C))[0]


def whole(part: Float[Array, "C D"], rules: ActivationRules) -> Float[Array, "C D"]:
  """A piece of the token table on every device; the piece is gathered, not the table.

  Its gradient is summed whole and then cut, which compilers make a reduce-scatter of; left alone,
  gradients of slots would be exchanged to suit the table.
  """
  return shard_act(shard_act(part, rules, None, "table"), rules, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole_head(part: Float[Array, "C D"], rules: ActivationRules) -> Float[Array, "C D"]:
  """As `whole`; the gradient, which a matmul sums, is scattered at once."""
  return whole(part, rules)


whole_head.defvjp(
  lambda part, rules: (whole(part, rules), None),
  lambda rules, _, gradient: (shard_act(gradient, rules, None, "table"),),
)


def table_rows(cfg: DecoderConfig) -> int:
  """Rows of the tables: a token each, and spare ones so that a tensor axis splits them evenly."""
  return -(-cfg.vocab_size // cfg.shards) * cfg.shards


class Embedder(nn.Module):
  """Token table and head."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  def setup(self):
    shape, init = (table_rows(self.cfg), self.cfg.width), scaled_by(1)
    self.input_embedding = self.param("input_embedding", init, shape)
    if not self.cfg.tied_head:
      self.output_embedding = self.param("output_embedding", init, shape)

  def encode(self, tokens):
    table = self.input_embedding
    if (
      self.cfg.layout == "fused"
    ):  # else a CPU's compiler widens all of the table to take a few rows
      table, tokens = jax.lax.optimization_barrier((table, tokens))
    x = lookup(table, tokens, self.rules).astype(self.cfg.dtype)
    return x * jnp.asarray(self.cfg.width**0.5, x.dtype) if self.cfg.scale_embedding else x

  def decode(self, x, rows=None):
    table = self.input_embedding if self.cfg.tied_head else self.output_embedding
    if rows is not None:
      table = jax.lax.dynamic_slice_in_dim(table, *rows)
    if self.cfg.layout == "fused" and not self.rules:
      x = x.astype(self.cfg.dtype)
      logits = widened(x, table, self.cfg, columns=0, dtype=jnp.float32)
      return logits if rows is not None else logits[..., : self.cfg.vocab_size]
    table = whole_head(table.astype(self.cfg.dtype), self.rules)
    x = x.astype(self.cfg.dtype)
    return jnp.einsum("...D,WD->...W", x, table, preferred_element_type=jnp.float32)
