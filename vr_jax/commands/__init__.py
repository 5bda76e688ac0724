"""The commands, a file each: `vr_jax.cli.COMMANDS` is their table, options.py reads options."""
