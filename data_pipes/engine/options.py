"""What a user chooses for `vr engine run`."""

from dataclasses import dataclass, field

from data_pipes.isolation import check_seconds

ITEM_SECONDS = 3600.0  # two hours of 1080p take half of it to be looked through


@dataclass(frozen=True)
class RunOptions:
  """How a run goes; the keywords of `run`.

  Attributes:
    budget_usd: stop before more is spent.
    retry_quarantined: try failed items again.
    item_seconds: that an item may take in a stage; then it is quarantined.
    runner: "local"; "ray" (Ray Core actors at `address`); "array" prints a job array instead.
    only: "PHASE:SHARD" of a job array, instead of everything; writes no published files.
  """

  budget_usd: float | None = field(
    default=None, metadata={"help": "stop before more is spent", "metavar": "USD"}
  )
  retry_quarantined: bool = field(default=False, metadata={"help": "try failed items again"})
  item_seconds: float = field(
    default=ITEM_SECONDS,
    metadata={"help": "that an item may take in a stage (default: %(default)g)", "metavar": "S"},
  )
  runner: str = field(
    default="local", metadata={"help": "local (default), ray, or array (printed)"}
  )
  address: str | None = field(default=None, metadata={"help": "of the Ray cluster"})
  only: str | None = field(
    default=None, metadata={"help": "one task of a job array", "metavar": "PHASE:SHARD"}
  )

  def __post_init__(self):
    check_seconds(self.item_seconds)
