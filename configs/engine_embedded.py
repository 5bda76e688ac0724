"""The data engine with embedded agents: no network, no weights. For demo and plumbing only.

    vr engine run --config configs/engine_embedded.py:videos=CLIPS,captions=C.json --workdir W

CPU, about a second of one core for a second of video and object. CLIPS is a folder of videos,
C.json holds [{"video": path in CLIPS, "caption": text}, ...]; without it, what moves is taken.
Expect W/out/videorefer-detailed-caption.json and -short-caption.json in the published format; train
on them with `input.media` = W/media. `path=short` and `path=qa` (captions: annotated items) are the
other two published paths. Its texts and masks are no training data for real models.
"""

from ml_collections import ConfigDict

from data_pipes.engine.stages import engine_config
from vr_jax.configs import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  arg = parse_arg(arg, videos=".", captions="", path="detailed")
  config = engine_config()
  config.path = arg.path
  config.input.videos = arg.videos
  config.input.files = (arg.captions,) if arg.captions else ()
  return config
