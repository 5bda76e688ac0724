# ruff: noqa: E501 (the reasons stand in full)
"""vr data check: every class of defect with its exact reason, cleaned copies, flat memory."""

import json
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ExifTags, Image

from data_pipes import check, check_report
from data_pipes.check import DEFECTS, NOTICES, Checks, check_file
from data_pipes.errors import InputError
from data_pipes.masks import encode_mask
from vr_jax.cli import main

SIZE = (48, 64)
FRAMES = 40
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6


def write_clip(path: Path, count=FRAMES, size=SIZE, rotate=None, times=None) -> Path:
  """An H.264 clip; `times` are presentation times in 1/25 s."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(
      "libx264", rate=25, options={"g": "1000", "bf": "0", "preset": "ultrafast", "threads": "1"}
    )
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    if size[0] % 2 or size[1] % 2:
      stream.pix_fmt = "yuv444p"
    if rotate is not None:
      stream.set_display_rotation(rotate)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (*size, 3), np.uint8)
    for i in range(count):
      frame = av.VideoFrame.from_ndarray(np.roll(picture, i, 1), format="rgb24")
      frame.pts = i if times is None else times[i]
      frame.time_base = Fraction(1, 25)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def cut_by_edit_list(source: Path, path: Path, hidden: int) -> Path:
  """Shortens the edit list's only segment, so that a player stops before the last frames."""
  data = bytearray(source.read_bytes())
  at = data.index(b"elst") + 12
  duration = int.from_bytes(data[at : at + 4], "big")
  data[at : at + 4] = (duration * (FRAMES - hidden) // FRAMES).to_bytes(4, "big")
  path.write_bytes(data)
  return path


def break_in_the_middle(source: Path, path: Path) -> Path:
  """Overwrites the second half of the stream; the index of its packets stays whole."""
  data = bytearray(source.read_bytes())
  start = data.index(b"mdat") + 4
  length = int.from_bytes(data[start - 8 : start - 4], "big") - 8
  at = start + length // 2
  data[at : start + length] = bytes([255]) * (start + length - at)
  path.write_bytes(data)
  return path


def png_of_size(width: int, height: int) -> bytes:
  """A PNG that states a size; what would have to be decoded is not there."""
  head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  data = b"IDAT" + zlib.compress(bytes(100))
  chunks = (
    struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data)
  )
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_raw(path: Path, codec: str, pixels: str) -> Path:
  """A clip of one frame by a codec that keeps every bit."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=25)
    stream.height, stream.width, stream.pix_fmt = *SIZE, pixels
    frame = av.VideoFrame.from_ndarray(np.zeros((*SIZE, 3), np.uint8), format="rgb24")
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def state_size(source: Path, path: Path, width: int, height: int) -> Path:
  """Overwrites the size that the header of an AVI states."""
  data = bytearray(source.read_bytes())
  at = data.index(b"strf") + 12
  data[at : at + 8] = struct.pack("<ii", width, height)
  path.write_bytes(data)
  return path


def write_sound(path: Path) -> Path:
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=44100, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), "fltp", "mono")
    frame.sample_rate = 44100
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("media")
  whole = write_clip(folder / "a.mp4")
  cut_by_edit_list(whole, folder / "cut.mp4", 6)
  break_in_the_middle(whole, folder / "broken.mp4")
  write_clip(folder / "turned.mp4", rotate=90)
  write_clip(folder / "uneven.mp4", times=[i + (i >= 20) * 9 for i in range(FRAMES)])
  write_clip(folder / "odd.mp4", size=(47, 63))
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("not a video\n" * 50)
  Image.new("RGB", (64, 48), (9, 8, 7)).save(folder / "i.png")
  Image.new("RGBA", (64, 48), (9, 8, 7, 100)).save(folder / "alpha.png")
  Image.new("L", (64, 48), 9).save(folder / "grey.png")
  (folder / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
  write_raw(folder / "grey.mkv", "ffv1", "gray")
  write_raw(folder / "alpha.mov", "qtrle", "argb")
  state_size(
    write_raw(folder / "raw.avi", "rawvideo", "bgr24"), folder / "bomb.avi", 12_000, 12_000
  )
  write_sound(folder / "sound.mp4")
  Image.new("L", (4, 4)).save(folder / "bomb.gif")
  with open(folder / "bomb.gif", "r+b") as gif:
    gif.seek(6)
    gif.write(struct.pack("<HH", 60_000, 60_000))
  Image.fromarray(np.full(SIZE, 40_000, np.uint16)).save(folder / "deep.png")
  Image.new("RGB", (64, 48), (9, 8, 7)).save(folder / "turned.jpg", exif=TURNED)
  noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
  Image.fromarray(noise).save(folder / "noise.png")
  (folder / "half.png").write_bytes((folder / "noise.png").read_bytes()[:4000])
  (folder / "bomb.png").write_bytes(png_of_size(20_000, 20_000))
  return folder


def mask(top=10, left=10, height=20, width=20, size=SIZE):
  cells = np.zeros(size, np.uint8)
  cells[top : top + height, left : left + width] = 1
  return encode_mask(cells)


def item(**changes):
  """A sound item, with changes; a value of ... takes the key away."""
  value = {
    "id": "x",
    "video": "a.mp4",
    "conversations": [
      {"from": "human", "value": "<video>\nWhat is <region>?"},
      {"from": "gpt", "value": "A box."},
    ],
    "annotation": [{"0": {"segmentation": mask()}, "7": {"segmentation": mask()}}],
    **changes,
  }
  return {k: v for k, v in value.items() if v is not ...}


def image_item(path, **changes):
  talk = [{"from": "human", "value": "<image>\nWhat is <region>?"}, item()["conversations"][1]]
  annotation = [{"0": {"segmentation": mask()}}]
  return item(video=..., image=path, conversations=talk, annotation=annotation, **changes)


BENCH_D = {
  "id": 3,
  "video": "a.mp4",
  "caption": "A box.",
  "frame_idx": "7",
  "annotation": [{"7": {"segmentation": mask()}}],
}
BENCH_Q = {
  "id": 4,
  "video": "a.mp4",
  "Question": "What is <object0><region>?",
  "type": "Basic",
  "options": ["(A) A box", "(B) A dog"],
  "Answer": "(A) A box",
  "frame_idx": "7",
  "annotation": [{"7": {"segmentation": mask()}}],
}


def write(path: Path, items) -> Path:
  path.write_text(json.dumps(items))
  return path


def checked(tmp_path, items, media, **options):
  file = write(tmp_path / "f.json", items)
  return list(check.check_file(file, Checks(media, **options)))


SOUND = [
  item(),
  item(annotation=..., masks=[{"0": mask(), "7": mask()}]),  # as the successors' trainers read it
  item(annotation=[[{"0": {"segmentation": mask()}}]]),  # nested one deeper
  item(annotation=[{"0": {"segmentation": [[1, 1, 30, 1, 30, 30]]}}]),
  item(height=48, width=64),
  image_item("i.png"),
  # LLaVA and VideoLLaMA: no objects; the tag in any place; text alone.
  item(annotation=..., conversations=[{"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "A."}]),
  item(annotation=..., video=..., image="i.png", conversations=[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]),
  item(annotation=..., video=..., conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]),
  # The SFT format of the successors: a list of one path, no tag, masks of an image alone.
  item(annotation=..., video=["a.mp4"], masks=[{"7": mask()}], conversations=[{"from": "human", "value": "What is <region>?"}, {"from": "gpt", "value": "A."}]),
  image_item("i.png") | {"annotation": None, "masks": [mask()]},
  BENCH_D,
  BENCH_Q,
]  # fmt: skip


def test_every_known_format_passes(tmp_path, media):
  items = [{**one, "id": i} for i, one in enumerate(SOUND)]
  found = checked(tmp_path, items, media, decode=True, grid=4)
  assert [(c.id, c.findings) for c in found] == [(i, ()) for i in range(len(SOUND))]
  assert main(["data", "check", str(tmp_path / "f.json"), "--media", str(media)]) == 0


def test_an_absolute_path_below_the_media_folder(tmp_path, media, monkeypatch):
  """However the folder is written; without one nothing is known of where media should lie."""
  (tmp_path / "link").symlink_to(media)
  monkeypatch.chdir(media.parent)
  paths = [media / "a.mp4", media / "x/.." / "a.mp4", media.resolve() / "a.mp4"]
  items = [item(id=i, video=str(path)) for i, path in enumerate(paths)]
  for folder in (media, Path(media.name), tmp_path / "link", None):
    assert [c.findings for c in checked(tmp_path, items, folder)] == [()] * 3
  (bad,) = checked(tmp_path, [item(video=f"{media}-2/a.mp4")], media)
  assert [f.kind for f in bad.findings] == ["path"]


BAD_MASK = {"size": [48, 64], "counts": "zz~"}
CASES = [
  ("item", "text", "found text; accepted: an object with 'conversations'"),
  ("media-key", item(image="i.png"), "found keys 'video' and 'image'; accepted: one of them, or neither"),
  ("media-key", item(video=7), "key 'video': found a number; accepted: one path"),
  ("path", item(video="../a.mp4"), "media '../a.mp4' leads out of the media folder; accepted: a path inside it"),
  ("path", item(video="x/../../a.mp4"), "media 'x/../../a.mp4' leads out of the media folder; accepted: a path inside it"),
  ("path", item(video="/etc/passwd"), "media '/etc/passwd' leads out of the media folder; accepted: a path inside it"),
  ("conversations", item(conversations=...), "key 'conversations': found nothing; accepted: a list of messages"),
  ("conversations", item(conversations=item()["conversations"][:1]), "conversations: found human; accepted: human, gpt, human, gpt, ..."),
  ("media-tag", item(conversations=[{"from": "human", "value": "<region>"}, {"from": "gpt", "value": "A"}]), "key 'conversations': found no messages with <video> although key 'video' is given; accepted: exactly one"),
  ("media-tag", item(video=..., annotation=...), "found <video> in the text but no media; accepted: a key 'video' or 'image'"),
  ("stream", item(stream=True), "found a streaming sample; accepted: key 'stream' unset"),
  ("region-count", item(annotation=[{"0": {"segmentation": mask()}}] * 2), "found 1 <region> after <video> but 2 annotated objects; accepted: equal numbers, the i-th tag takes the i-th object"),
  ("object", item(annotation=[{}]), "key 'annotation', object 0: found an object without frames; accepted: {frame number: segmentation, ...}"),
  ("never-seen", item(annotation=[{"0": {"segmentation": None}, "7": {}}]), "object 0: found no mask in 2 frames; accepted: at least one"),
  ("never-seen", item(annotation=[{"0": {"segmentation": mask(height=0)}}]), "object 0: found no mask in 1 frames; accepted: at least one"),
  ("frame-key", item(annotation=[{"f7": {"segmentation": mask()}}]), "key 'annotation', object 0: frame key: found 'f7'; accepted: a frame number such as \"36\""),
  ("frame-key", item(annotation=[{"7" * 5000: {"segmentation": mask()}}]), f"key 'annotation', object 0: frame key: found '{'7' * 5000}'; accepted: a frame number such as \"36\""),
  ("frame-range", item(annotation=[{"0": {"segmentation": mask()}, "40": {"segmentation": mask()}}]), "object 0: found frame 40; accepted: 0 to 39"),
  ("segmentation", item(annotation=[{"0": {"segmentation": "abc"}}]), "key 'annotation', object 0, frame 0: segmentation: found text; accepted: RLE {'size': [height, width], 'counts': text or list}, a list of polygons [[x, y, ...], ...], or null"),
  ("segmentation", item(annotation=[{"0": {"segmentation": BAD_MASK}}]), "object 0, frame 0: mask counts 'zz~' are no compressed COCO run lengths"),
  ("segmentation", item(annotation=[{"0": {"segmentation": {"size": [48, 64], "counts": [5, 6]}}}]), "object 0, frame 0: mask counts cover 11 pixels; its size 48x64 has 3072"),
  ("segmentation", item(annotation=[{"0": {"segmentation": [[1, 2, 3, 4]]}}]), "object 0, frame 0: polygon [1, 2, 3, 4]; a list x, y, x, y, ... of three points or more is needed"),
  ("mask-size", item(annotation=[{"0": {"segmentation": mask(size=(64, 48))}}]), "object 0, frame 0: found a mask of 64x48; accepted: the size of the frame, 48x64 (height x width)"),
  ("segmentation", item(annotation=[{"0": {"segmentation": {"size": [10**5, 10**5], "counts": [10**10]}}}]), "object 0, frame 0: mask size is 100000x100000; accepted: up to 134217728 pixels"),
  ("size", item(height=10**5, width=10**5), "keys 'height', 'width': found 100000, 100000; accepted: two positive whole numbers, at most 134217728 pixels, or neither key"),
  ("size", item(height=0, width=64), "keys 'height', 'width': found 0, 64; accepted: two positive whole numbers, at most 134217728 pixels, or neither key"),
  ("media-absent", item(video="none.mp4"), "{media}/none.mp4: no such file"),
  ("media-absent", item(video="a" * 300), f"{{media}}/{'a' * 300}: File name too long"),
  ("utf-8", item(video="\ud800.mp4"), "found '\\ud800.mp4', half a surrogate pair; accepted: JSON in UTF-8"),
  ("utf-8", item(conversations=[{"from": "human", "value": "<video>\n<region>?"}, {"from": "gpt", "value": "A\ud800"}]), "found 'A\\ud800', half a surrogate pair; accepted: JSON in UTF-8"),
  ("utf-8", {**BENCH_D, "caption": "\ud800"}, "found '\\ud800', half a surrogate pair; accepted: JSON in UTF-8"),
  ("media-empty", item(video="empty.mp4"), "{media}/empty.mp4: the file is empty"),
  ("media-unreadable", item(video="text.mp4"), "{media}/text.mp4: cannot be read as a video (Invalid data found when processing input)"),
  ("media-unreadable", item(video="half.mp4"), "{media}/half.mp4: cannot be read as a video (Invalid data found when processing input)"),
  ("media-unreadable", item(video="sound.mp4"), "{media}/sound.mp4: holds no video stream"),
  ("media-unreadable", image_item("half.png"), "{media}/half.png: cannot be read as an image (image file is truncated)"),
  ("media-unreadable", image_item("deep.png"), "{media}/deep.png: cannot be read as an image (mode I;16: more than 8 bits a channel; accepted: 8-bit images)"),
  ("media-unreadable", image_item("text.mp4"), "{media}/text.mp4: cannot be read as an image (unknown format)"),
  ("media-damaged", item(video="broken.mp4"), "{media}/broken.mp4: frame 21 is damaged"),
  ("too-large", item(video="bomb.avi"), "{media}/bomb.avi: found 12000x12000 pixels (height x width); accepted: up to 134217728"),
  ("too-large", item(video="bomb.gif"), "{media}/bomb.gif: Image size (3600000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack."),
  ("too-large", image_item("bomb.png"), "{media}/bomb.png: Image size (400000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack."),
  ("bench", {**BENCH_Q, "Answer": "(C) A cat"}, "Answer '(C) A cat' is none of the options ['(A) A box', '(B) A dog']"),
  ("bench", {**BENCH_D, "frame_idx": "8"}, "object 0 has no annotation on frame_idx 8; accepted: one of 7"),
  ("bench", {**BENCH_D, "frame_idx": None}, "key 'frame_idx': found None; accepted: a frame number"),
  ("bench", {**BENCH_D, "annotation": []}, "found 0 objects; accepted: a caption of one object"),
  ("item", {**{k: v for k, v in BENCH_Q.items() if k != "options"}}, "no key 'options'; accepted: VideoRefer-Bench-Q, whose items have video, Question, options, Answer, frame_idx, annotation"),
  ("region-count", {**BENCH_Q, "Question": "What?"}, "found 0 <region> in the question but 1 annotated objects; accepted: equal numbers, the i-th tag takes the i-th object"),
  # Notices: handled, and counted.
  ("null-mask", item(annotation=[{"0": {"segmentation": mask()}, "7": {"segmentation": None}, "9": {}}]), "object 0: 2 of 3 frames have no mask"),
  ("vanishing", item(annotation=[{"0": {"segmentation": mask(0, 0, 2, 2)}}]), "object 0: vanishes on a grid of 4 in 1 frames"),
  ("presented-count", item(video="cut.mp4"), "the container claims 40 frames, a player shows 34"),
  ("variable-rate", item(video="uneven.mp4"), "20.4082 frames per second on average"),
  ("rotated", item(video="turned.mp4", annotation=[{"0": {"segmentation": mask(size=(64, 48))}}]), "by 90 degrees"),
  ("odd-size", item(video="odd.mp4", annotation=[{"0": {"segmentation": mask(size=(47, 63))}}]), "47x63 (height x width)"),
  ("alpha", image_item("alpha.png"), "mode RGBA"),
  ("alpha", item(video="alpha.mov", annotation=[{"0": {"segmentation": mask()}}]), "a video with transparency"),
  ("greyscale", image_item("grey.png"), "mode L"),
  ("greyscale", item(video="grey.mkv", annotation=[{"0": {"segmentation": mask()}}]), "a video without colour"),
  ("orientation", image_item("turned.jpg"), "tag 6"),
  ("frame-list", item(video=["i.png"] * 2, timestamps=[0, 1], masked_video=["i.png"], annotation=[{"7": mask()}]), "2 pictures"),
  ("size-differs", item(height=96, width=64), "found height x width 96x64; the media has 48x64"),
]  # fmt: skip
OWN_TESTS = {"json", "duplicate-id"}  # of a whole file


@pytest.mark.parametrize(("kind", "one", "reason"), CASES, ids=[c[0] for c in CASES])
def test_a_class_and_its_reason(tmp_path, media, kind, one, reason):
  (found,) = checked(tmp_path, [one], media, decode=True, grid=4)
  (finding,) = found.findings
  assert finding.kind == kind
  assert finding.reason == reason.replace("{media}", str(media))
  assert "\n" not in finding.reason
  defects = int(kind in DEFECTS)
  file = str(tmp_path / "f.json")
  command = ["data", "check", file, "--media", str(media), "--decode", "--grid", "4"]
  assert main(command) == 2 * defects
  if not defects:
    assert main([*command, "--reject", kind]) == 2


def test_every_class_has_a_case():
  assert {c[0] for c in CASES} | OWN_TESTS == {*DEFECTS, *NOTICES}


def test_a_file_that_breaks_off_counts_what_came_before(tmp_path, media):
  text = json.dumps([item(id=1), item(id=2)])
  (tmp_path / "f.json").write_text(text[:-30])
  first, last = check.check_file(tmp_path / "f.json", Checks(media))
  assert first.findings == ()
  (finding,) = last.findings
  assert finding.kind == "json"
  assert "after 1 items: the file ends inside an item (truncated?)" in finding.reason


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("[" * 200_000, "lists or objects are nested too deep"),
    ('[{"id": %s}]' % ("1" * 5000), "Exceeds the limit (4300 digits) for integer string conversion"),
    (json.dumps([1]).encode("utf-16"), "found '\xff'"),
  ],
)  # fmt: skip
def test_files_that_python_cannot_parse_are_defects(tmp_path, text, reason):
  (tmp_path / "f.json").write_bytes(text if isinstance(text, bytes) else text.encode())
  (found,) = check.check_file(tmp_path / "f.json", Checks())
  (finding,) = found.findings
  assert finding.kind == "json"
  assert f"after 0 items: {reason}; accepted: one JSON array of items" in finding.reason


def test_an_item_that_is_not_utf8_is_one_defect(tmp_path, media):
  text = json.dumps([item(id=1), item(id="HERE"), item(id=3)]).encode()
  (tmp_path / "f.json").write_bytes(text.replace(b"HERE", b"\xe9"))
  found = list(check.check_file(tmp_path / "f.json", Checks(media)))
  assert [[f.kind for f in c.findings] for c in found] == [[], ["utf-8"], []]
  assert found[1].findings[0].reason.startswith("found 'utf-8' codec can't decode byte 0xe9")


def test_repeated_ids(tmp_path, media):
  found = checked(tmp_path, [item(id=1), item(id="1"), item(id=2), item(id=1)], media)
  assert [[f.kind for f in c.findings] for c in found] == [[], [], [], ["duplicate-id"]]
  assert found[3].findings[0].reason == "found id 1 again; accepted: an id of its own"


def test_a_mended_id_is_new_in_the_whole_file(tmp_path, media):
  ids = ["x", "x", "x", "x#1", "x#2", "x#2.2"]
  file = write(tmp_path / "f.json", [item(id=i) for i in ids])
  check_report.check([file], Checks(), check_report.Outputs(fix=tmp_path / "fixed"))
  fixed = [one["id"] for one in json.loads((tmp_path / "fixed" / "f.json").read_text())]
  assert fixed == ["x", "x#1.2", "x#2.3", "x#1", "x#2", "x#2.2"]


def test_an_item_without_id_is_not_the_one_that_has_its_number(tmp_path, media):
  nameless = {k: v for k, v in item(conversations=[]).items() if k != "id"}
  file = write(tmp_path / "f.json", [item(id=1), nameless])
  found = check_report.check([file], Checks())["defects"]["conversations"]
  assert found["ids"] == ["(item 1)"]
  assert [c.id for c in check_file(file, Checks())] == [1, None]


def test_ids_are_remembered_beyond_the_buffer():
  seen = check.Seen()
  assert all(seen.add(i) for i in range(140_000))
  assert not any(seen.add(i) for i in (0, 65_536, 65_537, 131_073, 139_999))
  assert seen.add(200_000)


def test_summary_report_and_cleaned_copy(tmp_path, media, capsys):
  long = {"0": {"segmentation": mask()}, "40": {"segmentation": mask()}}
  bad_mask = {"0": {"segmentation": BAD_MASK}, "7": {"segmentation": mask()}}
  items = [
    item(id="sound"),
    item(id="long", annotation=[long]),
    item(id="drawn", annotation=[bad_mask]),
    item(id="sound"),
    item(id="lost", video="none.mp4"),
    item(id="gone", annotation=[{"44": {"segmentation": mask()}}]),
    item(id="null", annotation=[{"0": {"segmentation": mask()}, "7": {"segmentation": None}}]),
  ]
  # Spacing of its own shows that sound items are copied byte for byte.
  file = tmp_path / "f.json"
  file.write_text("[" + " ,\n".join(json.dumps(one, indent=3) for one in items) + "]")
  command = ["data", "check", str(file), "--media", str(media), "--json"]
  command += ["--report", str(tmp_path / "r.json"), "--fix", str(tmp_path / "fixed")]
  assert main(command) == 2
  summary = json.loads(capsys.readouterr().out)
  assert summary == json.loads((tmp_path / "r.json").read_text())
  assert summary["items"] == 7
  assert summary["good"] == 2
  assert {k: (c["items"], c["ids"]) for k, c in summary["defects"].items()} == {
    "frame-range": (2, ["long", "gone"]),
    "segmentation": (1, ["drawn"]),
    "duplicate-id": (1, ["sound"]),
    "media-absent": (1, ["lost"]),
  }
  assert {k: c["ids"] for k, c in summary["notices"].items()} == {"null-mask": ["null"]}
  lines = [json.loads(x) for x in (tmp_path / "r.json.items.jsonl").read_text().splitlines()]
  assert [(x["item"], x["id"], x["class"]) for x in lines] == [
    (1, "long", "frame-range"), (2, "drawn", "segmentation"), (3, "sound", "duplicate-id"),
    (4, "lost", "media-absent"), (5, "gone", "frame-range"), (6, "null", "null-mask"),
  ]  # fmt: skip
  fixed = json.loads((tmp_path / "fixed/f.json").read_text())
  assert [one["id"] for one in fixed] == ["sound", "long", "drawn", "sound#3", "null"]
  assert fixed[1]["annotation"] == [{"0": {"segmentation": mask()}}]
  assert fixed[2]["annotation"] == [{"0": {"segmentation": None}, "7": {"segmentation": mask()}}]
  assert json.dumps(items[0], indent=3) in (tmp_path / "fixed/f.json").read_text()
  changes = (tmp_path / "fixed/f.json.changes.jsonl").read_text().splitlines()
  assert [(json.loads(x)["id"], json.loads(x)["change"]) for x in changes] == [
    ("long", "frame left out"),
    ("drawn", "mask is now null"),
    ("sound", "id is now 'sound#3'"),
    ("lost", "item left out"),
    ("gone", "item left out: an object would be left without a mask"),
  ]
  assert main(["data", "check", str(tmp_path / "fixed/f.json"), "--media", str(media)]) == 0


def test_threads_change_nothing(tmp_path, media):
  items = [
    {**one, "id": i} if isinstance(one, dict) else one for i, (_, one, _) in enumerate(CASES)
  ]
  file = write(tmp_path / "f.json", items)
  one, four = (list(check.check_file(file, Checks(media, decode=True), jobs)) for jobs in (1, 4))
  assert one == four


def test_wrong_use_is_said(tmp_path, media):
  file = write(tmp_path / "f.json", [item()])
  with pytest.raises(InputError, match="no such file"):
    check_report.check([tmp_path / "none.json"], Checks())
  with pytest.raises(InputError, match="no such folder of media"):
    check_report.check([file], Checks(tmp_path / "none"))
  with pytest.raises(InputError, match="would write over a source"):
    check_report.check([file], Checks(media), check_report.Outputs(fix=tmp_path))
  with pytest.raises(InputError, match="reject 'blue'; accepted: null-mask, "):
    Checks(reject=("blue",))


def test_checking_needs_no_jax():
  code = "import sys, data_pipes.check; assert 'jax' not in sys.modules, 'jax'"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
