# mypy: ignore-errors
"""VideoRefer in PyTorch: frames and masks become tokens, tokens become an answer.

    frames -- vision_tower (SigLIP) -+- mm_projector (scene tokens) --------+
                                     +- region_encoder (object tokens) -----+- decoder - logits
    input_ids -- embed_tokens ------------------------------------------------+

Letters: B row, P frame of the row, S pixel, T scene frame, N patch, D tower width, R object,
F frame of an object, U token of an object, V scene token, L slot, E decoder width, W vocabulary.

Inputs are what `VideoReferProcessor` makes: frames u8 [B,P,S,S,3], scene i64 [B,T], region_masks u8
[B,R,P,N], region_frames i64 [B,R,F] (-1: none), input_ids i64 [B,L], visual i64 [B,L] (-1, or the
row of scene and object tokens that the slot takes), attention_mask bool [B,L]. labels i64 [B,L] lie
under input_ids: the id that the slot holds, -100 where it is not to be learned.

Source: VideoRefer Suite (arXiv 2501.00599). Parameter names are those of its published code, and of
transformers' Qwen2 and Gemma.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_videorefer import VideoReferConfig

IGNORE = -100


# --- Vision tower -----------------------------------------------------------------------------


class TowerAttention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      setattr(self, name, nn.Linear(width, width))

  def forward(self, x):
    q, k, v = (
      proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TowerMlp(nn.Module):
  def __init__(self, width, hidden):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

  def forward(self, x):
    return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TowerLayer(nn.Module):
  def __init__(self, c):
    super().__init__()
    self.layer_norm1 = nn.LayerNorm(c["width"], eps=1e-6)
    self.self_attn = TowerAttention(c["width"], c["heads"])
    self.layer_norm2 = nn.LayerNorm(c["width"], eps=1e-6)
    self.mlp = TowerMlp(c["width"], c["mlp_dim"])

  def forward(self, x):
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class TowerEmbeddings(nn.Module):
  def __init__(self, c):
    super().__init__()
    patch, grid = c["patch_size"], c["image_size"] // c["patch_size"]
    self.patch_embedding = nn.Conv2d(3, c["width"], patch, stride=patch)
    self.position_embedding = nn.Embedding(grid * grid, c["width"])

  def forward(self, pixels):
    return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class Tower(nn.Module):
  """SigLIP; its output is the hidden state that `select_layer` names."""

  def __init__(self, c):
    super().__init__()
    select, depth = c["select_layer"], c["depth"]
    whole = select is None
    layers = depth if whole else select + (depth + 1 if select < 0 else 0)
    self.embeddings = TowerEmbeddings(c)
    self.encoder = nn.Module()
    self.encoder.layers = nn.ModuleList(TowerLayer(c) for _ in range(layers))
    self.post_layernorm = nn.LayerNorm(c["width"], eps=1e-6) if whole else None

  def forward(self, frames):  # u8 [X,S,S,3] -> [X,N,D]
    pixels = (frames.float() * 0.00392156862745098 - 0.5) / 0.5
    weight = self.embeddings.patch_embedding.weight
    x = self.embeddings(pixels.permute(0, 3, 1, 2).to(weight.dtype))
    for layer in self.encoder.layers:
      x = layer(x)
    return x if self.post_layernorm is None else self.post_layernorm(x)


# --- Scene tokens -----------------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
  """Over the channels of [X,C,h,w], in float32."""

  def __init__(self, width):
    super().__init__(width, eps=1e-5)

  def forward(self, x):
    y = F.layer_norm(
      x.permute(0, 2, 3, 1).float(),
      self.normalized_shape,
      self.weight.float(),
      self.bias.float(),
      self.eps,
    )
    return y.permute(0, 3, 1, 2).to(x.dtype)


class ConvNorm(nn.Module):
  def __init__(self, width_in, width, kernel=1, groups=1):
    super().__init__()
    self.conv = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, groups=groups, bias=False)
    self.bn = ChannelNorm(width)

  def forward(self, x):
    return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
  def __init__(self, width, squeezed):
    super().__init__()
    self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

  def forward(self, x):
    y = x.float().mean((2, 3), keepdim=True).to(x.dtype)
    return x * self.fc2(F.silu(self.fc1(y))).sigmoid()


class Bottleneck(nn.Module):
  def __init__(self, width_in, width):
    super().__init__()
    self.conv1 = ConvNorm(width_in, width)
    self.conv2 = ConvNorm(width, width, kernel=3, groups=width)
    self.se = SqueezeExcite(width, round(width_in / 4))
    self.conv3 = ConvNorm(width, width)
    self.downsample = ConvNorm(width_in, width) if width_in != width else nn.Identity()

  def forward(self, x):
    y = self.conv3(self.se(F.silu(self.conv2(F.silu(self.conv1(x))))))
    return F.silu(y + self.downsample(x))


def stage(width_in, width, depth=4):
  blocks = nn.Module()
  for i in range(depth):
    setattr(blocks, f"b{i + 1}", Bottleneck(width_in if i == 0 else width, width))
  return blocks


def per_frame(blocks, x):  # [B,C,t,h,w], each frame by itself
  B = x.shape[0]
  x = x.transpose(1, 2).flatten(0, 1)
  for block in blocks.children():
    x = block(x)
  return x.unflatten(0, (B, -1)).transpose(1, 2)


def mlp(width_in, width):
  return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))


class Connector(nn.Module):
  """Stages around a sampler that joins blocks of frames, rows and columns; then a readout."""

  def __init__(self, kind, width_in, width):
    super().__init__()
    staged = kind.startswith("st")
    stride = (2, 2, 2) if staged else (1, 2, 2)
    wide = width if staged else width_in
    padding = int(kind in ("stc_connector", "spatial_conv"))
    convolves = kind in ("stc_connector_v35", "stc_connector", "spatial_conv")
    if staged:
      self.s1, self.s2 = stage(width_in, width), stage(width, width)
    sampler = nn.Conv3d(wide, width, stride, stride, padding) if convolves else nn.AvgPool3d(stride)
    self.sampler = nn.Sequential(sampler, nn.SiLU())
    self.readout = mlp(width if convolves or staged else width_in, width)
    self.staged = staged

  def forward(self, x):  # [B,T,N,D] -> [B,V,E]
    side = round(x.shape[2] ** 0.5)
    x = x.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)
    x = self.sampler(per_frame(self.s1, x) if self.staged else x)
    x = per_frame(self.s2, x) if self.staged else x
    return self.readout(x.flatten(2).transpose(1, 2))


def connector(kind, width_in, width):
  if kind == "linear":
    return nn.Linear(width_in, width)
  return mlp(width_in, width) if kind == "mlp2x_gelu" else Connector(kind, width_in, width)


# --- Object tokens ----------------------------------------------------------------------------


def merge_tokens(x, valid, u):
  """Runs of similar neighbours become their mean: ([b,u,D] float32, which of them exist).

  With more than u valid frames a cut falls where the similarity of neighbours is strictly below the
  u-th smallest.
  """
  unit = F.normalize(x, dim=-1, eps=1e-12)
  similarity = (unit[..., :-1, :] * unit[..., 1:, :]).sum(-1)
  cut = valid[..., 1:]
  if similarity.shape[-1] >= u:
    ordered = similarity.masked_fill(~cut, torch.inf).sort(-1).values
    keep_all = valid.sum(-1, keepdim=True) <= u
    cut = cut & (keep_all | (similarity < ordered[..., u - 1, None]))
  segment = F.pad(cut.cumsum(-1), (1, 0)).masked_fill(~valid, -1)
  member = (segment[..., None, :] == torch.arange(u, device=x.device)[:, None]).float()
  count = member.sum(-1, keepdim=True)
  x = x.masked_fill(~valid[..., None], 0)
  return member @ x / count.clamp(min=1), count[..., 0] > 0


class RegionEncoder(nn.Module):
  """Mean of the features under each mask, merged over time, lifted to the decoder's width."""

  def __init__(self, width_in, width, tokens):
    super().__init__()
    self.feat_linear, self.tokens = mlp(width_in, width), tokens

  def forward(self, features, masks, frames):
    masks = masks.float()
    weights = masks / masks.sum(-1, keepdim=True).clamp(min=1)
    pooled = torch.einsum("bpnd,brpn->brpd", features.float(), weights)
    index = frames.clamp(min=0)[..., None].expand(-1, -1, -1, pooled.shape[-1])
    tokens, kept = merge_tokens(pooled.gather(2, index), frames >= 0, self.tokens)
    return self.feat_linear(tokens.to(features.dtype)), kept


# --- Decoder ----------------------------------------------------------------------------------


class RMSNorm(nn.Module):
  def __init__(self, width, c):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(width))
    self.eps, self.offset = c["norm_eps"], float(c["norm_plus_one"])

  def forward(self, x):
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
    return (y * (self.weight.float() + self.offset)).to(x.dtype)


def rotate(x, cos, sin):  # [B,n,L,H]
  a, b = x.float().chunk(2, -1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
  def __init__(self, c):
    super().__init__()
    self.c = c
    D, H, N, K = c["width"], c["head_dim"], c["heads"], c["kv_heads"]
    self.q_proj = nn.Linear(D, N * H, bias=c["qkv_bias"])
    self.k_proj = nn.Linear(D, K * H, bias=c["qkv_bias"])
    self.v_proj = nn.Linear(D, K * H, bias=c["qkv_bias"])
    self.o_proj = nn.Linear(N * H, D, bias=False)
    if c["qk_norm"]:
      self.q_norm, self.k_norm = RMSNorm(H, c), RMSNorm(H, c)

  def forward(self, x, mask, cos, sin, past):
    c, H = self.c, self.c["head_dim"]
    q, k, v = (p(x).unflatten(-1, (-1, H)) for p in (self.q_proj, self.k_proj, self.v_proj))
    if c["qk_norm"]:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if past is not None:
      k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    groups = c["heads"] // c["kv_heads"]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = H**-0.5 if c["query_scale"] is None else c["query_scale"]
    scores = (q @ keys.transpose(2, 3)).float() * scale
    if c["attn_soft_cap"] is not None:
      scores = torch.tanh(scores / c["attn_soft_cap"]) * c["attn_soft_cap"]
    weights = scores.masked_fill(~mask[:, None], -2.0e38).softmax(-1).to(v.dtype)
    return self.o_proj((weights @ values).transpose(1, 2).flatten(2)), (k, v)


class GatedMlp(nn.Module):
  def __init__(self, c):
    super().__init__()
    self.gate_proj = nn.Linear(c["width"], c["mlp_dim"], bias=False)
    self.up_proj = nn.Linear(c["width"], c["mlp_dim"], bias=False)
    self.down_proj = nn.Linear(c["mlp_dim"], c["width"], bias=False)
    self.silu = c["activation"] == "silu"

  def forward(self, x):
    gate = self.gate_proj(x)
    gate = F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")
    return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nn.Module):
  """One layer; Gemma 2 and 3 have norms behind the sub-layers too."""

  def __init__(self, c):
    super().__init__()
    self.self_attn, self.mlp = Attention(c), GatedMlp(c)
    self.input_layernorm = RMSNorm(c["width"], c)
    self.post_attention_layernorm = RMSNorm(c["width"], c)
    self.post_norms = c["post_norms"]
    if self.post_norms:
      self.pre_feedforward_layernorm = RMSNorm(c["width"], c)
      self.post_feedforward_layernorm = RMSNorm(c["width"], c)

  def forward(self, x, mask, cos, sin, past):
    y, past = self.self_attn(self.input_layernorm(x), mask, cos, sin, past)
    if not self.post_norms:
      x = x + y
      return x + self.mlp(self.post_attention_layernorm(x)), past
    x = x + self.post_attention_layernorm(y)
    return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), past


class VideoReferModel(nn.Module):
  """All parts under their published names."""

  def __init__(self, cfg):
    super().__init__()
    self.c = c = cfg["llm"]
    self.embed_tokens = nn.Embedding(c["vocab_size"], c["width"])
    self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c["depth"]))
    self.norm = RMSNorm(c["width"], c)
    self.make_visual(cfg)

  def make_visual(self, cfg):
    """Tower, connector and region encoder."""
    c, width_in = cfg["llm"], cfg["img"]["width"]
    self.vision_tower = nn.Module()
    self.vision_tower.vision_tower = nn.Module()
    self.vision_tower.vision_tower.vision_model = Tower(cfg["img"])
    self.mm_projector = connector(cfg["connector"]["kind"], width_in, c["width"])
    self.averages_frames = cfg["connector"]["kind"] in ("linear", "mlp2x_gelu")
    self.region_encoder = RegionEncoder(width_in, c["width"], cfg["region"]["tokens"])

  def embed(self, ids):
    x = self.embed_tokens(ids)
    return x * torch.tensor(self.c["width"] ** 0.5, dtype=x.dtype) if self.scaled else x

  @property
  def scaled(self):
    return self.c["scale_embedding"]

  def splice(self, frames, scene, region_masks, region_frames, input_ids, visual, attention_mask):
    """(embeddings [B,L,E], positions [B,L], order [B,L]): valid slots first, then padding at
    position -1; `order` is where each slot was.
    """
    B = frames.shape[0]
    tower = self.vision_tower.vision_tower.vision_model
    features = tower(frames.flatten(0, 1)).unflatten(0, (B, -1))
    of_scene = features.gather(1, scene[:, :, None, None].expand(-1, -1, *features.shape[2:]))
    if self.averages_frames:
      of_scene = of_scene.float().mean(1).to(features.dtype)
    rows = self.mm_projector(of_scene)
    objects, kept = self.region_encoder(features, region_masks, region_frames)
    exists = torch.cat([torch.ones_like(rows[:, :, 0], dtype=torch.bool), kept.flatten(1)], 1)
    rows = torch.cat([rows, objects.flatten(1, 2).to(rows.dtype)], 1)
    return self.placed(rows, exists, input_ids, visual, attention_mask)

  def placed(self, rows, exists, input_ids, visual, attention_mask):
    """`splice` with the visual tokens [B,X,E] and which of them exist."""
    row, is_visual = visual.clamp(min=0), visual >= 0
    text = self.embed(input_ids)
    taken = rows.gather(1, row[:, :, None].expand(-1, -1, rows.shape[-1])).to(text.dtype)
    embeds = torch.where(is_visual[:, :, None], taken, text)
    valid = attention_mask.bool() & (~is_visual | exists.gather(1, row))
    order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    valid = valid.gather(1, order)
    embeds = embeds.gather(1, order[:, :, None].expand_as(embeds)) * valid[:, :, None]
    index = torch.arange(valid.shape[1], device=valid.device)
    return embeds, torch.where(valid, index, -1), order

  def decode(self, x, positions, past=None):
    """(hidden states after the final norm, cache); the cache is (positions, keys and values)."""
    c = self.c
    seen = positions if past is None else torch.cat([past[0], positions], 1)
    tables = {kind: self.tables(kind, positions, seen) for kind in set(c["pattern"])}
    cache = []
    for i, layer in enumerate(self.layers):
      kind = c["pattern"][i % len(c["pattern"])]
      x, kv = layer(x, *tables[kind], None if past is None else past[1][i])
      cache.append(kv)
    return self.norm(x), (seen, cache)

  def tables(self, kind, positions, seen):
    """Which keys a query sees, and the rotary angles, of one kind of layer."""
    c, local = self.c, kind == "local"
    own_base = local and c["local_rope_base"]
    base = c["local_rope_base"] if own_base else c["rope_base"]
    scale = 1.0 if own_base else c["rope_scale"]
    q, k = positions[:, :, None], seen[:, None, :]
    mask = (k >= 0) & (k <= q)
    if local and c["window"] is not None:
      mask = mask & (q - k < c["window"])
    powers = torch.arange(0, c["head_dim"], 2, device=positions.device).float() / c["head_dim"]
    angles = positions.float()[:, None, :, None] * (1.0 / (base**powers) / scale)
    return mask, angles.cos(), angles.sin()


class VideoReferForCausalLM(PreTrainedModel, GenerationMixin):
  """The model with its head, and a `generate` of its own that starts from video and text."""

  config_class = VideoReferConfig
  base_model_prefix = "model"
  accepts_loss_kwargs = True  # num_items_in_batch, of the Trainer
  _no_split_modules = ["DecoderLayer", "TowerLayer"]  # noqa: RUF012
  parts = VideoReferModel

  def __init__(self, config):
    super().__init__(config)
    c = config.videorefer["llm"]
    self.model = self.parts(config.videorefer)
    self.lm_head = None if c["tied_head"] else nn.Linear(c["width"], c["vocab_size"], bias=False)
    self.soft_cap = c["final_soft_cap"]
    self.post_init()

  def _init_weights(self, module):
    """Weights come from the checkpoint."""

  def logits(self, hidden):
    head = self.model.embed_tokens if self.lm_head is None else self.lm_head
    logits = F.linear(hidden, head.weight).float()
    return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

  def forward(
    self,
    frames,
    scene,
    region_masks,
    region_frames,
    input_ids,
    visual,
    attention_mask,
    labels=None,
    num_items_in_batch=None,
    inputs_embeds=None,
    output_attentions=None,
    output_hidden_states=None,
    return_dict=True,
  ):
    """Logits of every slot, float32 [B,L,W]: valid slots first; `past_key_values` goes on.

    With `labels` also the loss: the mean over the slots that have one, or their sum over
    `num_items_in_batch` (which the Trainer of transformers gives). The names from inputs_embeds on
    are those that libraries pass along; they may only say nothing.
    """
    if inputs_embeds is not None or output_attentions or output_hidden_states:
      raise TypeError("inputs_embeds, output_attentions and output_hidden_states are not supported")
    spliced = self.model.splice(
      frames, scene, region_masks, region_frames, input_ids, visual, attention_mask
    )
    return self.scored(*spliced, visual, labels, num_items_in_batch)

  def scored(self, embeds, positions, order, visual, labels, num_items_in_batch):
    """What `forward` gives, of spliced rows."""
    hidden, cache = self.model.decode(embeds, positions)
    logits = self.logits(hidden)
    if labels is None:
      return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
    labels = labels.masked_fill(visual >= 0, IGNORE).gather(1, order)
    labels = labels.masked_fill(positions < 0, IGNORE)[:, 1:]
    total = F.cross_entropy(
      logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    count = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithPast(loss=total / count, logits=logits)

  @torch.no_grad()
  def generate(
    self,
    frames,
    scene,
    region_masks,
    region_frames,
    input_ids,
    visual,
    attention_mask,
    *,
    max_new_tokens=256,
    do_sample=False,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=None,
    eos_token_id=None,
    pad_token_id=None,
  ):
    """New token ids [B,M]; a row that has met its end is filled with `pad_token_id`.

    Greedy by default. What is not given is that of generation_config.json; the penalty falls on
    generated tokens only. An option that is not named here is a TypeError.
    """
    embeds, positions, _ = self.model.splice(
      frames, scene, region_masks, region_frames, input_ids, visual, attention_mask
    )
    return self.continued(
      embeds,
      positions,
      max_new_tokens=max_new_tokens,
      do_sample=do_sample,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      repetition_penalty=repetition_penalty,
      eos_token_id=eos_token_id,
      pad_token_id=pad_token_id,
    )

  def continued(
    self,
    embeds,
    positions,
    *,
    max_new_tokens=256,
    do_sample=False,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=None,
    eos_token_id=None,
    pad_token_id=None,
  ):
    """What `generate` gives, of spliced rows."""
    if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
      raise ValueError(
        f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, top_p={top_p};"
        " accepted: at least 1, above 0, at least 0, above 0 to 1"
      )
    settings = self.generation_config
    penalty = settings.repetition_penalty if repetition_penalty is None else repetition_penalty
    eos = settings.eos_token_id if eos_token_id is None else eos_token_id
    pad = settings.pad_token_id if pad_token_id is None else pad_token_id
    eos = torch.tensor([eos] if isinstance(eos, int) else eos or [], device=self.device)
    pad = 0 if pad is None else pad
    hidden, cache = self.model.decode(embeds, positions)
    length = (positions >= 0).sum(1)
    last = (length - 1).clamp(min=0)
    logits = self.logits(hidden[torch.arange(len(hidden), device=hidden.device), last])
    done = torch.zeros_like(length, dtype=torch.bool)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    tokens = []
    while True:
      if penalty not in (None, 1.0):
        punished = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, punished, logits)
      token = sample(logits, temperature, top_k, top_p) if do_sample else logits.argmax(-1)
      token = token.masked_fill(done, pad)
      tokens.append(token)
      seen.scatter_(1, token[:, None], True)
      done = done | torch.isin(token, eos)
      if done.all() or len(tokens) == max_new_tokens:
        return torch.stack(tokens, 1)
      at = torch.where(done, -1, length)[:, None]
      hidden, cache = self.model.decode(self.model.embed(token[:, None]), at, cache)
      logits = self.logits(hidden[:, 0])
      length = length + 1


def sample(logits, temperature, top_k, top_p):
  """A token of each row by temperature, top-k and top-p, in this order."""
  logits, ids = (logits / temperature).sort(-1, descending=True)
  if top_k:
    logits[:, top_k:] = -torch.inf
  probabilities = logits.softmax(-1)
  better = probabilities.cumsum(-1) - probabilities
  probabilities = probabilities.masked_fill(better >= top_p, 0)
  return ids.gather(1, torch.multinomial(probabilities, 1))[:, 0]
