import sys

from vr_jax.cli import main

sys.exit(main())
