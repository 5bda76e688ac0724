"""Region SPECs and `Region`s to objects with masks, and every way in which they can be wrong."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data_pipes.check import Finding, check_masks
from data_pipes.errors import InputError
from data_pipes.masks import encode_mask, grid_mask, mask_to_grid, segmentation_to_mask
from data_pipes.records import parse_item
from data_pipes.video import open_video
from vr_jax.inference.regions import Region, objects_of, parse_regions, warnings_of

HEIGHT, WIDTH = 30, 40


@pytest.fixture
def video():
  return open_video(np.zeros((12, HEIGHT, WIDTH, 3), np.uint8))


@pytest.fixture
def blob():
  mask = np.zeros((HEIGHT, WIDTH), np.uint8)
  mask[5:15, 8:20] = 1
  return mask


@pytest.fixture
def folder(tmp_path, monkeypatch, blob):
  """A working directory with mask files; SPECs name them relatively."""
  monkeypatch.chdir(tmp_path)
  Image.fromarray(blob * 255).save("mask.png")
  Image.fromarray(blob).save("a@b.png")  # 0 and 1
  palette = Image.fromarray(blob * 3).convert("P")
  palette.putdata((blob * 3).ravel().tolist())
  palette.save("palette.png")
  Image.fromarray(np.zeros_like(blob)).save("empty.png")
  Image.fromarray(blob[:10]).save("short.png")
  one = encode_mask(blob)
  files = {
    "one.json": one,
    "frames.json": {"4": one, "2": {"segmentation": one}, "7": {"segmentation": None}},
    "published.json": [{"3": {"segmentation": one}}],
    "polygon.json": {"3": [[8, 5, 20, 5, 20, 15, 8, 15]]},
    "two.json": [{"3": one}, {"3": one}],
    "absent.json": {"3": None},
    "late.json": {"12": one},
    "key.json": {"first": one},
    "size.json": {"3": encode_mask(blob[:10])},
    "text.json": {"3": "a mask"},
  }
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  (tmp_path / "broken.json").write_text('{"3": ')
  return tmp_path


def only(specs, video):
  (marked,) = objects_of(parse_regions(specs), video)
  return marked


@pytest.mark.parametrize("spec", ["mask.png@3", "a@b.png@3", "palette.png@3", "one.json@3"])
def test_files_of_one_frame(spec, folder, video, blob):
  marked = only([spec], video)
  assert marked.name == "object 0"
  assert list(marked.masks) == [3]
  np.testing.assert_array_equal(marked.masks[3], blob)
  assert marked.masks[3].dtype == np.uint8


def test_rle_files_of_several_frames(folder, video, blob):
  marked = only(["frames.json"], video)
  assert list(marked.masks) == [2, 4, 7]  # ascending, whatever the order of the keys
  np.testing.assert_array_equal(marked.masks[2], blob)
  assert not marked.masks[7].any()  # listed, but not seen
  np.testing.assert_array_equal(only(["published.json"], video).masks[3], blob)
  np.testing.assert_array_equal(only(["polygon.json"], video).masks[3], blob)


def test_boxes_and_points(video):
  box = only(["box:8,5,20,15@0"], video).masks[0]
  assert box.sum() == 12 * 10
  assert box[5:15, 8:20].all()
  assert only(["box:35.5,5,99,15@0"], video).masks[0][5:15, 35:].all()  # cut off at the border
  point = only(["point:20,10@11"], video).masks[11]
  assert point[10, 20] == 1
  assert 1 <= point.sum() < 60


def test_frames_by_time(golden):
  video = open_video(golden / "media" / "clip_mp4.mp4")
  for frame in (0, 7, len(video) - 1):
    time = f"{frame / video.fps + 0.001:.4f}s"
    assert list(only([f"point:20,10@{time}"], video).masks) == [frame]
  with pytest.raises(InputError, match=r"region point:20,10@1000s: .*1000 s; the video lasts"):
    only(["point:20,10@1000s"], video)


def test_an_image_needs_no_frame(golden):
  image = open_video(golden / "media" / "img_a.png")
  assert list(only(["point:20,10"], image).masks) == [0]


def test_names_group_regions_and_keep_their_order(folder, video):
  specs = [
    "cat=box:1,1,9,9@5",
    "point:20,10@3",
    "cat=mask.png@2",
    "point:20,10@3",
    "dog=one.json@1",
  ]
  objects = objects_of(parse_regions(specs), video)
  assert [(o.name, list(o.masks)) for o in objects] == [
    ("cat", [2, 5]),
    ("object 1", [3]),
    ("object 2", [3]),
    ("dog", [1]),
  ]


def test_python_regions(video, blob):
  regions = [
    Region(mask=blob.astype(bool), frame=np.int64(2)),
    Region(box=(8, 5, 20, 15), frame="2", name="cat"),
    Region(rle={3: encode_mask(blob)}, name="cat"),
    Region(rle=encode_mask(blob), frame=4, name="cat"),
  ]
  first, cat = objects_of(regions, video)
  assert (first.name, list(first.masks), cat.name, list(cat.masks)) == (
    "object 0",
    [2],
    "cat",
    [2, 3, 4],
  )
  for mask in (*first.masks.values(), *cat.masks.values()):
    np.testing.assert_array_equal(mask, blob)
  assert objects_of([], video) == []


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("box:8,5,20@0", r"region box:8,5,20@0: box .*x1,y1,x2,y2 in pixels"),
    ("box:8,5,x,15@0", "found 'x'; accepted: numbers"),
    ("box:8,5,inf,15@0", "found 'inf'; accepted: numbers"),
    ("box:20,5,8,15@0", "is empty; x1 < x2"),
    ("box:50,5,60,15@0", "lies outside the video of 40x30"),
    ("box:-9,5,0,15@0", "lies outside the video of 40x30"),
    ("box:5,-9,15,0@0", "lies outside the video of 40x30"),
    ("box:40,5,50,15@0", "lies outside the video of 40x30"),
    ("point:40,10@0", "lies outside the video of 40x30"),
    ("point:-1,10@0", "lies outside"),
    ("point:1,1@12", r"region point:1,1@12: frame 12; list of frames has frames 0 to 11"),
    ("point:1,1@-1", "FRAME: found '-1'; accepted: a frame number, or a time such as 1.5s"),
    ("point:1,1@soon", "FRAME: found 'soon'"),
    ("point:1,1", "no frame; accepted: a frame from 0 to 11, as in point:1,1@0"),
    ("point:1,1@1.5s", "a time was given, but the list has none"),
    ("circle:1,1@0", "neither a file nor a region; accepted: mask.png@FRAME, box:"),
    ("nothing.png@0", "neither a file nor a region"),
    ("", "neither a file nor a region"),
    ("mask.png", "no frame; accepted"),
    ("empty.png@0", "region empty.png@0: the mask is empty"),
    ("short.png@0", r"short.png: the mask is 10x40 \(height x width\), the video 30x40"),
    ("broken.json", "broken.json: cannot be read as JSON"),
    ("one.json", "no frame; accepted"),
    ("frames.json@3", "masks have frame numbers of their own"),
    ("two.json", "found 2 objects; accepted: one object in a file"),
    ("absent.json", "object 0: its mask is empty"),
    ("late.json", "frame 12; list of frames has frames 0 to 11"),
    ("key.json", "key 'first'; accepted: frame numbers"),
    ("size.json", "the mask is 10x40"),
    ("text.json", "segmentation is 'a mask'"),
  ],
)
def test_wrong_specs_say_so_in_one_line(spec, message, folder, video):
  with pytest.raises(InputError, match=message) as error:
    objects_of(parse_regions([spec]), video)
  assert "\n" not in str(error.value)


def test_wrong_regions_say_so(video, blob):
  with pytest.raises(InputError, match="one of mask, box, point, rle; found none"):
    Region(frame=3)
  with pytest.raises(InputError, match="found box, point"):
    Region(box=(1, 2, 3, 4), point=(1, 2), frame=3)
  for region, message in (
    (Region(mask=blob[None], frame=0), r"a mask array is \[H, W\]; found \[1, 30, 40\]"),
    (Region(mask=blob.T, frame=0), "the mask is 40x30"),
    (Region(mask=blob, frame=1.5), "frame 1.5; accepted: a frame number"),
    (Region(mask=blob, frame=True), "frame True; accepted"),
    (Region(mask=blob, frame="two"), "frame 'two'; accepted"),
    (Region(mask=0 * blob, frame=0), "region mask@0: the mask is empty"),
    (Region(rle={}, frame=0), "its mask is empty"),
  ):
    with pytest.raises(InputError, match=message):
      objects_of([region], video)
  with pytest.raises(InputError, match="frame 2 has a region of this object already"):
    objects_of(parse_regions(["cat=point:1,1@2", "cat=point:3,3@2"]), video)


def test_warnings_name_objects_that_vanish_on_the_grid():
  video = open_video(np.zeros((4, 480, 854, 3), np.uint8))
  dot = np.zeros((480, 854), np.uint8)
  dot[100, 100] = 1  # between the sample points of a 27x27 grid
  regions = [
    Region(mask=dot, frame=0, name="ant"),
    Region(mask=dot, frame=0, name="fly"),
    Region(box=(10, 10, 90, 90), frame=1, name="fly"),
    Region(point=(400, 200), frame=0),
  ]
  objects = objects_of(regions, video)
  ant, fly = warnings_of(objects, grid=27)
  assert ant.startswith("ant is too small for the model's 27x27 grid on frame 0: the cell it lies")
  assert "most of which is its surroundings" in fly
  ant, fly = warnings_of(objects, grid=27, rule="published")
  assert ant.startswith("ant is too small for the model's 27x27 grid on frame 0: the model learns")
  assert "fly" in fly
  assert "frame 0: those frames tell nothing of it" in fly
  assert warnings_of(objects, grid=27, rule="area") == []


def test_one_object_of_a_file_that_numbers_several(folder, video, blob):
  ids = blob.copy()
  ids[20:25, 1:6] = 2
  Image.fromarray(ids).save("ids.png")
  for number in (1, 2):
    np.testing.assert_array_equal(only([f"ids.png#{number}@3"], video).masks[3], ids == number)
  with pytest.raises(InputError, match="grey values 1, 2, which number objects; choose one"):
    only(["ids.png@3"], video)
  with pytest.raises(InputError, match="no object 7"):
    only(["ids.png#7@3"], video)
  Image.fromarray(blob * 255).save("a#2.png")  # a file of the whole name comes first
  np.testing.assert_array_equal(only(["a#2.png@3"], video).masks[3], blob)


def test_shares_of_the_picture(video):
  half = only(["box:25%,50%,75%,100%@0"], video).masks[0]
  np.testing.assert_array_equal(half, only(["box:10,15,30,30@0"], video).masks[0])
  point = only(["point:50%,50%@0"], video).masks[0]
  np.testing.assert_array_equal(point, only(["point:20,15@0"], video).masks[0])
  with pytest.raises(InputError, match=r"relative\? write box:30%,30%,60%,60%"):
    only(["box:0.3,0.3,0.6,0.6@0"], video)
  whole = only(["box:0,0,1,1@0"], video).masks[0]  # one pixel, in whole numbers
  assert whole.sum() == 1


def test_a_box_that_leaves_the_picture_says_so(video):
  marked = objects_of(parse_regions(["cat=box:-5,2,20,300@0"]), video)
  (line,) = warnings_of(marked, 4)
  assert (
    line == "cat: the box -5,2,20,300 leaves the picture of 40x30 (width x height) and is cut to it"
  )


def test_a_box_smaller_than_a_cell_says_so():
  video = open_video(np.zeros((1, 90, 160, 3), np.uint8))
  cell = 160 / 4, 90 / 4
  x, y = cell[0] / 2 - 4, cell[1] / 2 - 4  # where the published rule samples: it is not lost
  small = Region(box=(x, y, x + 8, y + 8), frame=0, name="ant")
  large = Region(box=(x, y, x + 41, y + 8), frame=0)
  for rule in ("keep", "published"):
    (line,) = warnings_of(objects_of([small, large], video), 4, rule=rule)
    assert line.startswith("ant is too small for the model's 4x4 grid on frame 0: the cell it lies")


def test_masks_go_to_the_grid_one_by_one():
  video = open_video([np.zeros((1080, 1920, 3), np.uint8)] * 2)
  regions = [
    Region(box=(9 * i, 300, 9 * i + 400, 900), frame=frame, name=f"{i}")
    for i in range(20)
    for frame in (0, 1)
  ]
  tracemalloc.start()
  marked = objects_of(regions, video, lambda mask: grid_mask(mask, 27))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(marked) == 20
  assert peak < 10 * 1080 * 1920  # bytes; the 40 masks take four times as much
  for one, whole in zip(marked[::7], objects_of(regions, video)[::7], strict=True):
    for frame in (0, 1):
      cells = mask_to_grid(whole.masks[frame], 27).reshape(-1)
      np.testing.assert_array_equal(one.masks[frame].cells, cells)


BLOB = encode_mask(np.eye(HEIGHT, WIDTH, dtype=np.uint8))
ENTRIES = [
  *(None, {}, BLOB, {"segmentation": BLOB}, {"segmentation": None}, {"segmentation": {}}),
  *({"counts": None}, {"segmentation": {"counts": None}}, {"segmentation": {"size": [30, 40]}}),
  *({"size": [30, 40]}, {"box": [1, 2, 9, 9]}, {"box": ["10%", 2, 9, 9]}, {"box": None}),
  *({"box": [9, 2, 1, 9]}, {"box": [50, 2, 60, 9]}, {"box": 5}, {"bbox": [1, 2, 9, 9]}),
  *({"segmentation": {"box": [1, 2, 9, 9]}}, {"segmentation": {"segmentation": BLOB}}),
  *({"segmentaton": BLOB}, {"segmentation": BLOB, "area": 30}, {"mask": BLOB}, BLOB | {"id": 1}),
  *([[1, 1, 9, 1, 9, 9]], {"segmentation": [[1, 1, 9, 1, 9, 9]]}, [[1, 1, 9]], [1, 2, 3], []),
  *("x", 5, True, BLOB | {"size": [9, 9]}, BLOB | {"counts": [1]}, {"segmentation": []}),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_ask_and_check_read_one_object_alike(video, entry):
  frames = {"2": BLOB, "5": entry}
  item = {
    "video": "a.mp4",
    "conversations": [
      {"from": "human", "value": "<video>\n<region>"},
      {"from": "gpt", "value": "It."},
    ],
    "annotation": [frames],
  }
  try:
    asked = objects_of([Region(rle=frames)], video)[0].masks
  except InputError:
    asked = None
  try:
    record = parse_item(item, "f")
    findings = list(check_masks(record, video.size))
  except InputError:
    findings = [Finding("item", "")]
  trained = None
  if not any(f.is_defect for f in findings):
    trained = {n: segmentation_to_mask(s, *video.size) for n, s in record.objects[0].items()}
  assert (asked is None) == (trained is None)
  for number in asked or ():
    np.testing.assert_array_equal(asked[number], trained[number])


def test_an_object_may_be_wrapped_as_in_the_published_files(video):
  frames = {"2": BLOB, "5": {"box": [1, 2, 9, 9]}}
  plain = objects_of([Region(rle=frames)], video)[0].masks
  for content in ([frames], [[frames]], {"2": frames}, [{"2": frames}]):
    masks = objects_of([Region(rle=content)], video)[0].masks
    assert list(masks) == [2, 5]
    np.testing.assert_array_equal(masks[5], plain[5])
  image = open_video([np.zeros((HEIGHT, WIDTH, 3), np.uint8)])
  image.kind = "image"
  assert list(objects_of([Region(rle={"36": BLOB})], image)[0].masks) == [0]  # any key is a dummy


def test_soft_edges_are_told(folder, video, blob):
  soft = (blob * 255.0).astype(np.uint8)
  soft[4, 8:20] = 100
  Image.fromarray(soft).save("soft.png")
  marked = objects_of(parse_regions(["soft.png@0"]), video)
  np.testing.assert_array_equal(marked[0].masks[0], blob)
  assert "cut at half" in warnings_of(marked, 4)[0]


def test_entries_of_rle_json(folder, video, blob):
  one = encode_mask(blob)
  content = {"4": {}, "2": {"segmentation": one}, "5": {"box": [8, 5, 20, 15]}, "6": None}
  marked = objects_of([Region(rle=content)], video)[0].masks
  assert list(marked) == [2, 4, 5, 6]
  np.testing.assert_array_equal(marked[2], blob)
  np.testing.assert_array_equal(marked[5], blob)
  assert not marked[4].any()
  assert not marked[6].any()
  for key in ("segmentaton", "mask", "size"):
    with pytest.raises(InputError, match=f"frame 7: key '{key}'; accepted: segmentation, box"):
      objects_of([Region(rle={"2": one, "7": {key: [30, 40]}})], video)
  with pytest.raises(InputError, match="two keys name one frame"):
    objects_of([Region(rle={"2": one, "02": one})], video)


def test_times_as_people_write_them(tmp_path):
  for k in range(12):
    Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
  folder = open_video(tmp_path, fps=10)
  for text, number in (("0.5s", 5), ("0:00.5", 5), ("0:01", 10), ("0:00:01.1", 11)):
    assert list(only([f"box:1,1,4,4@{text}"], folder).masks) == [number]


def test_a_name_that_is_zero_is_a_name(video):
  regions = [Region(box=(1, 1, 9, 9), frame=0), Region(box=(1, 1, 9, 9), frame=0, name=0)]
  assert [m.name for m in objects_of(regions, video)] == ["object 0", "0"]
  assert len(objects_of([regions[1], Region(point=(3, 3), frame=1, name=0)], video)) == 1


@pytest.mark.parametrize("mask", [np.full((30, 40), -3.5), np.eye(30, 40) * 2 - 1])
def test_logits_are_no_mask(video, mask):
  with pytest.raises(InputError, match=r"accepted: bool, 0/1 or 0/255"):
    objects_of([Region(mask=mask, frame=0)], video)
