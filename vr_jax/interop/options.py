"""What a user chooses for `vr convert`; without jax, for its --help."""

import dataclasses
from dataclasses import field


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
  """How weights are converted; the keywords of `convert`.

  Attributes:
    dtype: float32, float16 or bfloat16 for all tensors; by default each keeps its own.
    adapter: a PEFT folder that is merged into the decoder.
    allow_nonfinite: go on where weights hold NaN or Inf.
    shard_gb: the size of a file of weights, 10^9 bytes.
    logits: "auto" (where PyTorch is there and both models fit into memory), "always" or "never".
  """

  dtype: str | None = field(
    default=None, metadata={"help": "float32, float16, bfloat16 (default: as the source)"}
  )
  adapter: str | None = field(
    default=None, metadata={"help": "a PEFT adapter to merge into the decoder", "metavar": "DIR"}
  )
  allow_nonfinite: bool = field(default=False, metadata={"help": "go on over NaN and Inf"})
  # As transformers 4.40, which wrote the published shards.
  shard_gb: float = field(default=5.0, metadata={"help": "default: %(default)s"})
  logits: str = field(
    default="auto",
    metadata={
      "help": "compare both models on a batch (auto: with PyTorch, if they fit into memory)",
      "choices": ("auto", "always", "never"),
    },
  )
