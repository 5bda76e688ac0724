r"""The data engine with real models: Grounding DINO and SAM 2 on this machine, chat endpoints.

    vr engine run --config configs/engine_models.py:videos=CLIPS,captions=C.json,url=U,vlm=V,llm=L \
      --workdir W --limit 20 --budget-usd 5

One GPU with 16 GB for the Segmentor (SAM 2.1 tiny needs about 9 s a frame on a CPU core: a trial is
possible). The endpoint U, such as http://HOST:8000/v1, serves a vision-language model V and a
language model L. With --limit first, `vr engine status W` shows what all videos would cost.
Read the licences of the models you name.
"""

from ml_collections import ConfigDict

from data_pipes.engine.stages import engine_config
from vr_jax.configs import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  arg = parse_arg(
    arg,
    videos=".",
    captions="",
    path="detailed",
    url="http://localhost:8000/v1",
    key_env="",
    vlm="Qwen/Qwen3-VL-8B-Instruct",
    llm="Qwen/Qwen3-8B",
    dino="IDEA-Research/grounding-dino-base",
    sam="facebook/sam2.1-hiera-large",
    device="cuda",
  )
  config = engine_config()
  config.path = arg.path
  config.input.videos = arg.videos
  config.input.files = (arg.captions,) if arg.captions else ()
  chat = {"kind": "openai", "base_url": arg.url, "api_key_env": arg.key_env, "concurrency": 32}
  sees, reads = {**chat, "model": arg.vlm}, {**chat, "model": arg.llm}
  config.roles = {
    "analyzer": reads,
    "segmentor": {
      "kind": "transformers",
      "detector": arg.dino,
      "tracker": arg.sam,
      "device": arg.device,
    },
    "annotator": sees,
    "describer": sees,  # or {"kind": "python", "target": "vr_jax.agent:VideoReferAgent", …}
    "judge": reads,
    "refiner": reads,
  }
  config.masks.min_cycle_iou = 0.8
  return config
