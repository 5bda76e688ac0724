"""A sweep of the toy task; `broken` adds a member whose batch does not fit the devices."""

from toy_config import get_config as toy_config

from vr_jax.configs import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, lr=0.01, epochs=1.0, broken=False)
  config = toy_config(f"lr={arg.lr}")
  config.total_epochs = arg.epochs
  config.mesh = (("data", 1), ("fsdp", -1))
  return config


def sweep(add, arg=None):
  from vr_jax.configs import arg as arguments

  for lr in (0.02, 0.005):
    add(**arguments(lr=lr))
    add(b1=0.5, **arguments(lr=lr))
  if parse_arg(arg, lr=0.01, epochs=1.0, broken=False).broken:
    add(**{"input.batch_size": 5})
