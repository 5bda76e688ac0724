"""Whatever a user brings is read or refused in one line: mutated media, JSON and values, by seed.

Every call is a number: `pytest tests/test_fuzz.py` makes the same ones each time, and a failure
names its kind and number, which `call(kind, number, …)` makes again.
"""

import copy
import dataclasses
import io
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipes import (
  check,
  clips,
  images,
  json_items,
  mask_images,
  masks,
  records,
  video,
  video_index,
)
from data_pipes.batch import fit_shape
from data_pipes.errors import InputError
from data_pipes.masks import encode_mask, mask_from_box
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import open_video, scene_ids
from vr_jax.inference import bulk, options, reading, regions
from vr_jax.inference.options import Options
from vr_jax.inference.reading import Reader
from vr_jax.inference.regions import Region, objects_of, parse_regions, read_regions, warnings_of
from vr_jax.inference.requests import Request
from vr_jax.inference.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # of damaged files
COUNTS = {"video": 1500, "picture": 1000, "annotation": 2500, "region": 1500, "request": 1500}
COUNTS |= {"options": 1000, "value": 1000}  # 10 000 in all
SIZE = 24, 32  # height and width of everything here
DEEP = json.loads("[" * 200 + "]" * 200)
VALUES = (
  *(None, True, False, 0, 1, -1, 7, 2.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
  *(10**30, -(10**400), 2**31, 2**32, 2**63, 2**64, 1e-320),
  *("", "x", "3", "03", "٣", "-1", "1.5s", "0:01", "9" * 5000, "9" * 5000 + "s", "inf", "nan"),
  *("30%", "%", "nan%", "1e400%", "\ud800", "\0", "../..", "/", ".", "a" * 5000, "é\n\u2028"),
  *([], [[]], [None], [[], {}], ["30%"] * 4, [1, 2, 3, 4], [[1, 1, 9, 1, 9, 9]], [10**400] * 6),
  *([[math.inf] * 6], [[1e6, -1e6] * 4], [["1"] * 6], [0, 5000], DEEP),
  *({}, {"box": 5}, {"box": [1, 1, 9, 9]}, {"counts": None}, {"counts": "x"}, {"size": [24, 32]}),
  *({"size": [24, 32], "counts": [0, 768]}, {"size": [2**40, 2**40], "counts": "0"}),
  *({"segmentation": {"segmentation": None}}, {"": None}, {"3": {"3": {"3": {}}}}),
)
PYTHON_VALUES = (
  *(b"", b"x", (), {1}, object(), np.float32(1.5), np.int64(3), np.zeros(4), np.zeros((0, 3))),
  *(np.zeros(SIZE), np.full(SIZE, np.nan), np.full(SIZE, "x"), np.full(SIZE, None), Path("x")),
  *(
    np.zeros(SIZE, "timedelta64[s]"),
    np.zeros(SIZE, complex),
    range(4),
    len,
    Image.new("1", (4, 4)),
  ),
)


def moving(count: int = 8) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  picture = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
  return [np.roll(picture, 2 * i, 1) for i in range(count)]


def encoded(name: str, codec: str, options: dict[str, str]) -> bytes:
  file = io.BytesIO()
  with av.open(file, "w", format=name) as container:
    stream = container.add_stream(codec, rate=25, options=options)
    stream.height, stream.width = SIZE
    stream.pix_fmt = "yuv420p"
    for frame in moving():
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode())
  return file.getvalue()


def pictures(form: str, mode: str = "RGB", **options) -> bytes:
  file = io.BytesIO()
  first, *rest = (Image.fromarray(frame).convert(mode) for frame in moving())
  first.save(file, form, **options | ({"append_images": rest} if "save_all" in options else {}))
  return file.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, bytes]]:
  """The files that are mutated, by kind and name."""
  mask = np.zeros(SIZE, np.uint8)
  mask[5:15, 8:20] = 255
  ids = Image.fromarray(mask // 100, "P")
  ids.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
  held = {"mask.png": Image.fromarray(mask), "ids.png": ids, "bits.png": Image.fromarray(mask > 0)}
  pictured = {}
  for name, image in held.items():
    file = io.BytesIO()
    image.save(file, "PNG")
    pictured[name] = file.getvalue()
  x264 = {"preset": "veryfast", "g": "5", "bf": "2", "threads": "1"}
  return {
    "video": {
      "a.mp4": encoded("mp4", "libx264", x264),
      "b.mp4": encoded("mp4", "libx264", x264 | {"movflags": "faststart", "bf": "0"}),
      "a.avi": encoded("avi", "mpeg4", {"bf": "1"}),
      "a.mkv": encoded("matroska", "libx264", x264),
      "a.ts": encoded("mpegts", "libx264", x264),
      "a.m1v": encoded("mpeg1video", "mpeg1video", {}),
      "a.gif": pictures("GIF", "P", save_all=True, duration=40),
      "m.webp": pictures("WEBP", save_all=True, duration=40),
      "m.png": pictures("PNG", save_all=True, duration=40),
    },
    "picture": {
      **pictured,
      "a.jpg": pictures("JPEG"),
      "a.png": pictures("PNG", "RGBA"),
      "a.webp": pictures("WEBP"),
      "a.tif": pictures("TIFF"),
      "a.bmp": pictures("BMP"),
      "still.gif": pictures("GIF", "P"),
    },
  }


ITEM = {
  "id": "a",
  "video": "a.mp4",
  "conversations": [
    {"from": "human", "value": "<video>\nWhat are <region> and <region>?"},
    {"from": "gpt", "value": "Two."},
  ],
  "annotation": [
    {
      "0": {"segmentation": encode_mask(np.eye(*SIZE, dtype=np.uint8))},
      "3": {"segmentation": [[1, 1, 20, 1, 20, 20]]},
      "5": None,
    },
    {"3": {"box": [1, 2, 9, 9]}, "4": {"size": [24, 32], "counts": [700, 68]}},
  ],
  "height": 24,
  "width": 32,
}
LISTED = ITEM | {
  "video": ["0.png", "1.png"],
  "timestamps": [0.5, 1],
  "masked_video": ["2.png", "3.png", "4.png", "5.png"],
}
LISTED["masks"] = LISTED.pop("annotation")
PICTURE = {
  "image": "a.png",
  "conversations": [
    {"from": "human", "value": "What is <region>?"},
    {"from": "gpt", "value": "It."},
  ],
  "masks": [{"size": [24, 32], "counts": [700, 68]}],
}
BENCH = {
  "id": 3,
  "video": "a.mp4",
  "Question": "What is <region>?",
  "options": ["(A) x", "(B) y"],
  "Answer": "(A) x",
  "frame_idx": "3",
  "annotation": ITEM["annotation"][:1],
}
BENCH_INF = BENCH | {"frame_idx": math.inf}
REGIONS = [
  {"box": [1, 2, "30%", 9], "frame": 3},
  {"point": [4, "50%"], "frame": "0:00.2", "name": "cat"},
  {"rle": ITEM["annotation"][0], "name": "dog"},
  {"rle": {"size": [24, 32], "counts": [700, 68]}, "frame": 2},
  {"mask": "mask.png", "frame": 1},
]
LINE = {
  "id": "q1",
  "video": "a.gif",
  "question": "What are <region> and <region>?",
  "regions": [REGIONS[0], REGIONS[2]],
  "seconds": [0, 0.2],
  "fps": 10,
}
FIELDS = [field.name for field in dataclasses.fields(Region)]
CHECKS = check.Checks(grid=4)
SPECS = ("box:1,2,30%,9@3", "cat=point:4,50%@0:00.1", "mask.png@2", "ids.png#2@0.04s", "rle.json")


def mutated_bytes(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 4, 16))):
    at, length = rng.randrange(len(data) or 1), rng.choice((1, 2, 4, 4, 8, 64))
    match rng.randrange(7):
      case 0:
        data[at : at + 1] = bytes([rng.randrange(256)])
      case 1:
        data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
      case 2:
        del data[at:]
      case 3:
        del data[at : at + length]
      case 4:
        data[at:at] = data[at : at + length]
      case 5:
        data[at : at + length] = rng.randbytes(length)
      case 6:
        other = rng.choice(others)
        data[at:] = other[min(at, len(other)) :]
  return bytes(data)


def mutated(rng: random.Random, value, pool=VALUES):
  """A copy with one or two things in it changed."""
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 2))):
    places = [(value, None)]
    for place, _ in places:  # grows as it goes
      inner = place.items() if isinstance(place, dict) else enumerate(place)
      places += [(v, None) for _, v in inner if isinstance(v, dict | list) and v]
    place = rng.choice(places)[0]
    if not place:
      return value
    key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    match rng.randrange(8):
      case 0:
        del place[key]
      case 1 if isinstance(place, dict):
        place[rng.choice([v for v in VALUES if isinstance(v, str)])] = place.pop(key)
      case 2 if isinstance(place, list):
        place.append(copy.deepcopy(place[key]))
      case 3 if isinstance(place, dict):
        place[rng.choice(("segmentaton", "03", "mask", "name", "box", "masks"))] = copy.deepcopy(
          place[key]
        )
      case _:
        place[key] = copy.deepcopy(rng.choice(pool))
  return value


class Calls:
  """Makes the calls: a method for each kind, given the number of the call as a generator."""

  def __init__(self, folder: Path, files: dict[str, dict[str, bytes]], tokenizer: Tokenizer):
    self.folder, self.files = folder, files
    for kind in files.values():
      for name, content in kind.items():
        (folder / name).write_bytes(content)
    (folder / "frames").mkdir()
    for number, frame in enumerate(moving(3)):
      Image.fromarray(frame).save(folder / "frames" / f"{number}.png")
    (folder / "rle.json").write_text(json.dumps(ITEM["annotation"][0]))
    self.clip = open_video(np.stack(moving()))
    self.gif = open_video(folder / "a.gif")
    sizes = {"image_size": 28, "grid": 4, "tokens_per_object": 1, "scene_tokens": 8}
    self.shape = fit_shape([], scene=2, **sizes)
    self.reader = Reader(tokenizer, self.shape, Options())

  def _broken(self, rng: random.Random, kind: str) -> Path:
    contents = list(self.files[kind].values())
    name = rng.choice(list(self.files[kind]))
    suffix = Path(rng.choice((name, name, name, rng.choice(list(self.files[kind]))))).suffix
    path = self.folder / f"broken{suffix}"
    path.write_bytes(mutated_bytes(rng, self.files[kind][name], contents))
    return path

  def video(self, rng: random.Random) -> None:
    opened = open_video(self._broken(rng, "video"))
    assert opened.times is None or len(opened.times) == len(opened)
    frames = {0, len(opened) // 2, len(opened) - 1, *scene_ids(opened, 2)}
    opened.frames([n for n in frames if n >= 0], lambda frame: frame[:1])

  def picture(self, rng: random.Random) -> None:
    path = self._broken(rng, "picture")
    if rng.randrange(2):
      images.read_image(path, upright=bool(rng.randrange(2)))
    else:
      mask_images.read_mask_picture(path, rng.choice((None, 1, 2)))

  def annotation(self, rng: random.Random) -> None:
    item = mutated(rng, rng.choice((ITEM, ITEM, BENCH, LISTED, PICTURE)))
    if not rng.randrange(8):
      content = json.dumps([ITEM, item, BENCH]).encode()
      (self.folder / "f.json").write_bytes(mutated_bytes(rng, content, [content]))
      kinds = [f.kind for done in check.check_file("f.json", CHECKS) for f in done.findings]
      assert set(kinds) <= set(check.KINDS)
    record = records.parse_item(item, "f: item 0")
    list(check.check_masks(record, SIZE, grid=4))
    clips.read_clip(self.clip, self.shape, record.objects, size=record.size)

  def region(self, rng: random.Random) -> None:
    if rng.randrange(3):
      fields = mutated(rng, rng.choice(REGIONS), (*VALUES, *PYTHON_VALUES))
      marked = [Region(**{k: v for k, v in fields.items() if k in FIELDS})]
    else:
      spec = list(rng.choice(SPECS))
      for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(spec))
        spec[at : at + 1] = rng.choice(("", *"@#:%=-.0\ud800\0٣", "9" * 9))
        spec = spec or ["x"]
      marked = parse_regions(["".join(spec)])
    source = rng.choice((self.clip, self.gif))
    warnings_of(objects_of(marked, source), rng.choice((4, 27)))

  def request(self, rng: random.Random) -> None:
    if rng.randrange(3):
      line = json.dumps(mutated(rng, LINE), default=str).encode()
      if not rng.randrange(8):
        line = mutated_bytes(rng, line, [line])
      request = bulk._parse(line, 1).request()
    else:
      fields = LINE | {"regions": [Region(box=(1, 1, 9, 9), frame=2)] * 2, "annotation": ()}
      del fields["id"]
      fields["annotation"] = rng.choice(((), [{0: [[1, 1, 9, 1, 9, 9]]}]))
      fields[rng.choice(list(fields))] = rng.choice((*VALUES, *PYTHON_VALUES))
      request = Request(**fields)
    for result in self.reader.read([(0, request)]):
      if isinstance(result, tuple):
        raise result[1]

  def options(self, rng: random.Random) -> None:
    names = [field.name for field in dataclasses.fields(Options)]
    values = {}
    for name in rng.sample(names, 2):
      pools = VALUES, PYTHON_VALUES, (0, 1, 0.5, 64, "area", True)
      values[name] = rng.choice(rng.choice(pools))
    Options(**values).sampling(Sampling())

  def value(self, rng: random.Random) -> None:
    value = rng.choice(rng.choice((VALUES, PYTHON_VALUES, ([0, 3], "a.gif", "frames", 3))))
    call = rng.choice(
      (
        open_video,
        lambda v: open_video("frames", fps=v).time_to_frame(0.5),
        lambda v: open_video([v]).frames([0]),
        self.clip.frames,
        self.gif.time_to_frame,
        lambda v: scene_ids(self.gif, 2, 0.0, Request("a.gif", "?", seconds=(0, v)).seconds[1]),
        lambda v: read_regions(self.clip, v),
        lambda v: read_regions(self.clip, [v, SPECS[0]]),
        lambda v: images.read_image(v if isinstance(v, str) else "a.png"),
      )
    )
    call(value)

  def make(self, kind: str, number: int) -> bool:
    """Makes one call; whether it was read. Raises what is no InputError."""
    try:
      getattr(self, kind)(random.Random(f"{kind} {number}"))
      read, message = True, ""
    except InputError as error:
      read, message = False, str(error)
    except Exception as error:
      error.add_note(f"call {kind} {number}")
      raise
    assert len(message.splitlines()) == 1 - read, f"{kind} {number}: {message}"
    return read


@pytest.fixture(scope="module")
def calls(tmp_path_factory, files, golden) -> Calls:
  folder = tmp_path_factory.mktemp("fuzz")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder))
    yield Calls(folder, files, Tokenizer.from_folder(golden / "tiny_videorefer_qwen2"))


@pytest.mark.parametrize("kind", COUNTS)
def test_every_call_is_read_or_refused_in_one_line(calls, kind):
  results = Counter(calls.make(kind, number) for number in range(COUNTS[kind]))
  print(f"{kind}: {results[True]} read, {results[False]} refused in one line")
  assert results[True]  # mutations that leave something to read
  assert results[False]


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_further_calls(calls, kind):
  for number in range(COUNTS[kind], 20 * COUNTS[kind]):
    calls.make(kind, number)


def written(calls: Calls, name: str, content: bytes) -> Path:
  path = calls.folder / name
  path.write_bytes(content)
  return path


def cut_gif(calls: Calls) -> None:
  """Ends where the second picture is described."""
  whole = calls.files["video"]["a.gif"]
  for end in range(len(whole) - 40, len(whole)):
    open_video(written(calls, "cut.gif", whole[:end])).frames([7])


def unknown_codec(calls: Calls) -> None:
  content = calls.files["video"]["a.mp4"]
  open_video(written(calls, "codec.mp4", content.replace(b"avc1", b"zzz1")))


def asked(calls: Calls, line: str) -> None:
  request = bulk._parse(line.encode(), 1).request()
  ((_, error),) = calls.reader.read([(0, request)])
  raise error


def item(**changes) -> None:
  record = records.parse_item(ITEM | changes, "f: item 0")
  for found in check.check_masks(record, SIZE):
    raise InputError(found.reason)


def line(**changes):
  """A call with one line of a file of requests."""
  fields = {"video": "a.gif", "question": "<region>", "regions": [BOX]}
  return lambda calls: asked(calls, json.dumps(fields | changes))


def marked(**fields):
  return lambda calls: objects_of([Region(**BOX | {"box": None} | fields)], calls.clip)


BOX = {"box": [1, 1, 3, 3], "frame": 0}
TURN = {"from": {}, "value": ""}
NINES = "9" * 5000
HUGE = [[10**400] * 6]
# What calls raised before there was a boundary, by the kind of exception, and what is said now.
FOUND = {
  "AttributeError: codec": (unknown_codec, "codec.mp4: its codec is not known"),
  "IndexError: GIF": (cut_gif, "cut.gif: "),
  "TypeError: box": (line(regions=[BOX | {"box": 5}]), "region box:5@0: box 5; x1,y1,x2,y2"),
  "TypeError: name": (line(regions=[BOX | {"name": []}]), "name []; accepted: text"),
  "TypeError: region": (line(regions=[5]), "region 5; accepted: a SPEC"),
  "TypeError: from": (
    lambda c: item(conversations=[{"from": {}, "value": ""}]),
    "'from': found {}",
  ),
  "TypeError: video": (lambda c: open_video(5), "neither a path nor frames"),
  "TypeError: frames": (lambda c: c.clip.frames(None), "accepted: whole numbers"),
  "TypeError: top_k": (lambda c: Options(top_k=2.5), "top_k=2.5; accepted: a whole number from"),
  "TypeError: temperature": (lambda c: Options(temperature="hot"), "'hot'; accepted: 0 (greedy)"),
  "UFuncTypeError: mask": (marked(mask=np.zeros(SIZE, "m8[s]")), "a mask array of timedelta64"),
  "UnicodeEncodeError: question": (line(question="\ud800"), "half a surrogate pair"),
  "UnicodeEncodeError: name": (line(regions=[BOX | {"name": "\ud800"}]), "half a surrogate pair"),
  "UnicodeEncodeError: path": (lambda c: open_video("\ud800.mp4"), ".mp4: no such video"),
  "ValueError: path": (lambda c: images.read_image("a\0.png"), "cannot be read as an image"),
  "ValueError: number": (lambda c: asked(c, f'{{"id": {NINES}}}'), "cannot be read as JSON"),
  "ValueError: frame": (lambda c: parse_regions([f"point:1,1@{NINES}"]), "FRAME: found"),
  "ValueError: %": (lambda c: mask_from_box(["%", 1, 3, 3], *SIZE), "x1,y1,x2,y2 in pixels"),
  "ValueError: mask": (marked(mask=[[1], [1, 0]]), "a mask array is"),
  "ValueError: array": (lambda c: Options(mask_rule=np.zeros(4)), "accepted: keep"),
  "RecursionError: JSON": (lambda c: asked(c, "[" * 100_000), "cannot be read as JSON"),
  "OSError: path": (lambda c: open_video("a" * 5000), "no path of a video"),
  "OverflowError: corner": (marked(rle={"0": HUGE}, frame=None), "three points or more"),
  "OverflowError: frame_idx": (lambda c: records.parse_item(BENCH_INF, "f"), "found inf; accepted"),
  "OverflowError: seed": (lambda c: Options(seed=-1), "seed=-1; accepted: a whole number from 0"),
  "OverflowError: seconds": (line(seconds=[0, 1e308]), "accepted: two numbers, start and end"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_raised_once_is_refused_in_one_line(calls, name):
  call, message = FOUND[name]
  with pytest.raises(InputError, match=re.escape(message)) as caught:
    call(calls)
  assert len(str(caught.value).splitlines()) == 1


def test_a_title_in_another_alphabet_is_no_reason_to_refuse_a_video(calls):
  options = {"preset": "veryfast", "threads": "1"}
  content = encoded("matroska", "libx264", options)
  content = content.replace(b"Lavf", b"\xe9\xe8\xff\xfe")
  assert len(open_video(written(calls, "title.mkv", content))) == 8


def test_a_damaged_index_on_disk_is_made_anew(calls, monkeypatch):
  monkeypatch.setattr(video_index, "_SLOW", 0)
  path = written(calls, "kept.mp4", calls.files["video"]["a.mp4"] + b"\0")
  assert len(open_video(path)) == 8
  kept = video_index._kept(path)
  kept.write_bytes(kept.read_bytes()[:200])
  assert len(open_video(path)) == 8


class Decoder:
  """A container and packet of a library that raises what it likes."""

  name = "file:a.mp4"

  def demux(self, stream):
    yield self
    raise MemoryError

  def decode(self):
    raise NotImplementedError("such pictures")


def test_whatever_a_decoder_raises_is_damage_of_the_file():
  container = Decoder()
  packets = video_index.packets_of(container, None)
  with pytest.raises(InputError, match=r"^a.mp4: damaged video \(such pictures\)$"):
    video_index.decoded(next(packets), container)
  with pytest.raises(InputError, match=r"^a.mp4: damaged video \(MemoryError\)$"):
    next(packets)


def video_of(name: str):
  return lambda calls: open_video(calls.folder / name).frames([3])


# A function of ours behind each boundary, and a call that goes through it.
BEHIND = [
  (video_index, "_shown_stream", video_of("a.mp4")),
  (video_index, "counted", video_of("a.avi")),
  (video_index, "_turn", video_of("a.mkv")),
  (video_index._Scan, "shown", video_of("a.ts")),
  (video_index, "_ascending", video_of("a.avi")),
  (video._Stream, "_entry", video_of("a.mp4")),
  (video._RgbFrames, "__call__", video_of("a.mp4")),
  (video, "count_pictures", video_of("a.gif")),
  (video._Animation, "_delays", video_of("m.webp")),
  (video, "to_rgb", video_of("a.gif")),
  (images, "check_pixels", lambda calls: images.read_image(calls.folder / "a.jpg")),
  (images, "to_rgb", lambda calls: images.read_image(calls.folder / "a.jpg")),
  (images, "_natural", lambda calls: open_video("frames")),
  (mask_images, "_grey", lambda calls: mask_images.read_mask_picture("mask.png")),
  (mask_images, "_by_id", lambda calls: mask_images.read_mask_picture("ids.png", 2)),
  (
    mask_images,
    "_listed",
    lambda calls: mask_images.mask_of_array(np.arange(768).reshape(SIZE) % 5),
  ),
  (masks, "check_counts", lambda calls: item()),
  (masks, "_corners", lambda calls: item()),
  (records, "frame_segmentation", lambda calls: item()),
  (records, "_check_tag", lambda calls: item()),
  (json_items._Window, "skip_space", lambda calls: list(json_items.read_items("rle.json"))),
  (regions, "mask_from_box", line(**LINE)),
  (regions, "object_frames", line(**LINE)),
  (regions, "_number", lambda calls: parse_regions(SPECS)),
  (bulk, "parse_regions", line(regions=[SPECS[0]])),
  (reading, "question_prompt", line(**LINE)),
  (reading, "read_clip", line(**LINE)),
  (options, "_is_number", lambda calls: Options()),
]


@pytest.mark.parametrize(("place", "name", "call"), BEHIND, ids=[entry[1] for entry in BEHIND])
@pytest.mark.parametrize("fault", [KeyError, IndexError, TypeError, AttributeError, ValueError])
def test_a_fault_of_our_own_is_no_input_error(calls, monkeypatch, place, name, call, fault):
  def planted(*args, **kwargs):
    raise fault("planted")

  monkeypatch.setattr(place, name, planted)
  with pytest.raises(fault, match="planted") as caught:
    call(calls)
  assert not isinstance(caught.value, InputError)
