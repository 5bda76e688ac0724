"""`vr data import`: files of the shape that other tools write become items of our format.

The run lengths of one mask were written by the tools' own libraries: pycocotools 2.0.11, cvat-sdk
2.80 (`masks.encode_mask`) and label-studio-sdk 2.1 (`converter.brush.encode_rle`).
"""

import contextlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.importers.formats import FORMATS, import_items
from data_pipes.importers.marked import Left, box_segmentation
from data_pipes.masks import encode_mask, mask_from_box, segmentation_to_mask
from vr_jax import cli

MASK = np.zeros((24, 32), np.uint8)
MASK[4:20, 6:11] = MASK[4:8, 6:25] = MASK[15:20, 20:30] = MASK[10, 15] = 1
COCO_RLE = {
  "size": [24, 32],
  "counts": "d4`0800000000D<0000000^OM?330000000C11OO11OO11OO11OO1<000000000Q1",
}
CVAT_RLE = (
  "0, 19, 5, 19, 5, 19, 5, 19, 5, 5, 19, 5, 19, 5, 4, 1, 14, 5, 19, 5, 19, 5, 19, 5, 19, 5, 9, 15, "
  "9, 15, 9, 15, 9, 15, 9, 10"
)  # left 6, top 4, width 24, height 16
LABEL_STUDIO_RLE = [
  0, 0, 12, 0, 57, 27, 255, 2, 23, 0, 201, 127, 248, 204, 3, 37, 255, 227, 48, 12, 151, 255, 140,
  192, 50, 95, 254, 51, 0, 194, 127, 249, 172, 3, 9, 255, 230, 176, 12, 39, 255, 124, 2, 63, 252,
  174, 1, 132, 255, 243, 88, 6, 19, 255, 205, 96, 24, 79, 255, 53, 128, 97, 63, 252, 214, 1, 132,
  255, 241, 24, 6, 39, 255, 195, 224, 24, 79, 255, 17, 128, 98, 127, 252, 62, 1, 132, 255, 241, 24,
  6, 39, 255, 195, 224, 24, 79, 255, 17, 128, 98, 127, 252, 62, 1, 132, 255, 241, 24, 6, 39, 255,
  224, 64, 224, 0,
]  # fmt: skip
CLIP = Path(__file__).parent / "cases/media/cat.ts"  # 80 frames of 128x96, 25 a second


@pytest.fixture
def imported(tmp_path, capsys):
  """Imports a source as the command does, and checks what comes out; (items, what is left out)."""

  def run(source: Path, kind: str, *words: str, media: Path | None = None):
    out = tmp_path / "out" / "items.json"
    assert cli.main(["data", "import", str(source), "--from", kind, "--out", str(out), "--json",
                     *map(str, words)]) == 0  # fmt: skip
    summary = json.loads(capsys.readouterr().out)
    items = json.loads(out.read_text())
    assert summary["items"] == len(items) == len({item["id"] for item in items})
    check = ["data", "check", str(out), *(["--media", str(media)] if media else [])]
    assert cli.main(check) == 0, capsys.readouterr().out
    capsys.readouterr()
    return items, {what: counts["count"] for what, counts in summary["left"].items()}

  return run


def masks(item: dict) -> list[dict[int, np.ndarray]]:
  """Each object's masks by frame."""
  size = item.get("height"), item.get("width")
  return [
    {int(n): segmentation_to_mask(entry["segmentation"], *size) for n, entry in by_frame.items()}
    for by_frame in item.get("annotation", ())
  ]


def talk(item: dict) -> list[str]:
  return [turn["value"] for turn in item["conversations"]]


def write(path: Path, content) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return path


def frames(folder: Path, names, size=(32, 24)) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    Image.new("RGB", size, "gray").save(folder / name)


def coco() -> dict:
  half = MASK[:, :16].copy()
  ragged = [[2, 2, 20, 2, 20, 12, 2, 12], [1, 1, 3, 3]]
  return {
    "info": {"year": 2017},
    "images": [
      {"id": 139, "file_name": "000000000139.jpg", "height": 24, "width": 32, "license": 2},
      {"id": 285, "file_name": "sub\\000000000285.jpg", "height": 24, "width": 32},
      {"id": 632, "file_name": "empty.jpg", "height": 24, "width": 32},
    ],
    "annotations": [
      {"id": 1, "image_id": 139, "category_id": 18, "iscrowd": 0, "area": 180.0,
       "bbox": [2, 2, 18, 10], "segmentation": ragged},
      {"id": 2, "image_id": 139, "category_id": 10, "iscrowd": 0, "segmentation": COCO_RLE},
      {"id": 3, "image_id": 139, "category_id": 18, "iscrowd": 1,
       "segmentation": {"size": [24, 32], "counts": [0, 768]}},
      {"id": 4, "image_id": 285, "category_id": 18, "iscrowd": 0, "bbox": [3.5, 4, 10.2, 6],
       "segmentation": [], "num_keypoints": 3, "keypoints": [1, 1, 2]},
      {"id": 5, "image_id": 285, "category_id": 18, "iscrowd": 0,
       "segmentation": {"size": [24, 16], "counts": encode_mask(half)["counts"]}},
      {"id": 6, "image_id": 77, "category_id": 18, "iscrowd": 0, "segmentation": COCO_RLE},
    ],
    "categories": [
      {"id": 18, "name": "dog", "supercategory": "animal"},
      {"id": 10, "name": "traffic_light", "supercategory": "outdoor"},
    ],
  }  # fmt: skip


def test_coco(tmp_path, imported):
  source = write(tmp_path / "annotations/instances.json", coco())
  frames(tmp_path / "val2017", ["000000000139.jpg"])
  frames(tmp_path / "val2017/sub", ["000000000285.jpg"])
  items, left = imported(source, "coco", media=tmp_path / "val2017")
  assert [item["image"] for item in items] == ["000000000139.jpg", "sub/000000000285.jpg"]
  assert talk(items[0]) == [
    "<image>\nWhat is <region>?", "dog", "What is <region>?", "traffic light",
  ]  # fmt: skip
  polygon, rle = masks(items[0])
  assert polygon[0].sum() == 180
  assert np.array_equal(rle[0], MASK)
  assert np.array_equal(masks(items[1])[0][0], mask_from_box((3.5, 4, 13.7, 10), 24, 32))
  assert left == {
    "crowds, which are no single object": 1,
    "keypoints": 1,
    "masks of another size than their frame": 1,
    "objects without a mask": 1,
    "annotations of images that are not listed": 1,
  }


def test_a_coco_polygon_of_two_points_is_left_out_and_named(tmp_path, imported):
  content = coco()
  content["annotations"][1]["segmentation"] = [[1, 1, 3, 3]]
  items, left = imported(write(tmp_path / "a.json", content), "coco")
  assert left["masks that cannot be drawn"] == 1
  assert talk(items[0]) == ["<image>\nWhat is <region>?", "dog"]


def test_texts_take_the_place_of_names(tmp_path, imported):
  source = write(tmp_path / "instances.json", coco())
  texts = [
    {"image_id": 139, "id": 9, "caption": "A dog \n at a <region> light."},
    {"image_id": 139, "object": 2, "caption": "the red light"},
    {"image": "000000000285.jpg", "text": "nothing", "object": "8"},
    {"image_id": 999, "caption": "elsewhere"},
  ]
  captions = write(tmp_path / "captions.json", {"images": [], "annotations": texts})
  items, left = imported(source, "coco", "--captions", captions)
  assert [talk(item) for item in items[:3]] == [
    ["<image>\nPlease describe the image.", "A dog at a region light."],
    ["<image>\nPlease describe <region>.", "the red light"],
    ["<image>\nWhat is <region>?", "dog"],
  ]
  assert np.array_equal(masks(items[1])[0][0], MASK)
  assert left["texts about objects that have no mask"] == 1
  assert left["texts about media that are not there"] == 1


def test_captions_by_medium_and_object(tmp_path, imported):
  source = write(tmp_path / "instances.json", coco())
  captions = write(
    tmp_path / "c.json",
    {"000000000139": {"traffic_light": ["red", "a light"]}, "sub/000000000285.jpg": "A field."},
  )
  items, _ = imported(source, "coco", "--captions", captions)
  assert [talk(item)[-1] for item in items] == ["red", "a light", "dog", "A field.", "dog"]


def test_youtube_vis(tmp_path, imported):
  names = [f"0043f083b5/{k:05}.jpg" for k in (0, 5, 10)]
  video = {"id": 1, "file_names": names, "width": 32, "height": 24, "length": 3}
  content = {
    "videos": [video],
    "categories": [{"id": 26, "name": "sedan"}],
    "annotations": [
      {"id": 1, "video_id": 1, "category_id": 26, "iscrowd": 0, "bboxes": [None, [6, 4, 24, 16]],
       "segmentations": [None, COCO_RLE, {"size": [24, 32], "counts": [0, 768]}]},
      {"id": 2, "video_id": 1, "category_id": 26, "segmentations": [None, None, None]},
    ],
  }  # fmt: skip
  source = write(tmp_path / "train.json", content)
  items, left = imported(source, "ytvis")
  assert items[0]["video"] == "0043f083b5"
  (by_frame,) = masks(items[0])
  assert list(by_frame) == [1, 2]
  assert np.array_equal(by_frame[1], MASK)
  assert talk(items[0]) == ["<video>\nWhat is <region>?", "sedan"]
  assert left == {"objects without a mask": 1}
  # A folder of all frames: numbers are places in it.
  frames(tmp_path / "JPEGImages/0043f083b5", [f"{k:05}.jpg" for k in range(12)])
  items, _ = imported(source, "ytvis", "--media", tmp_path / "JPEGImages",
                      media=tmp_path / "JPEGImages")  # fmt: skip
  assert list(masks(items[0])[0]) == [5, 10]


def palette(path: Path, values: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(values.astype(np.uint8), "P")
  image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [255] * (3 * 253))
  image.save(path)


def davis(root: Path) -> Path:
  frames(root / "JPEGImages/480p/bike-packing", ["00000.jpg", "00001.jpg", "00002.jpg"])
  frames(root / "JPEGImages/480p/bear", ["00000.jpg"])
  two = np.where(MASK, 2, 0)
  two[:3] = 1
  two[22:] = 255  # a border of no object
  palette(root / "Annotations/480p/bike-packing/00000.png", two)
  palette(root / "Annotations/480p/bike-packing/00002.png", np.where(MASK, 2, 0))
  palette(root / "Annotations/480p/bike-packing/00009.png", two)
  (root / "Annotations/480p/bear").mkdir()
  Image.fromarray(255 * MASK).save(root / "Annotations/480p/bear/00000.png")  # as of DAVIS 2016
  palette(root / "Annotations/Full-Resolution/bear/00000.png", np.kron(MASK, np.ones((2, 2))))
  return root


def test_davis(tmp_path, imported):
  root = davis(tmp_path / "DAVIS")
  items, left = imported(root, "davis", media=root)
  assert [item["video"] for item in items] == [
    "JPEGImages/480p/bear", "JPEGImages/480p/bike-packing",
  ]  # fmt: skip
  assert talk(items[0])[1] == "bear"
  assert np.array_equal(masks(items[0])[0][0], MASK)
  first, second = masks(items[1])
  assert (list(first), list(second)) == ([0], [0, 2])
  assert first[0].sum() == 96
  assert np.array_equal(second[2], MASK)
  assert talk(items[1])[1::2] == ["an object"] * 2
  assert left.pop("masks without a frame of their name") == 1
  assert left.pop("further resolutions of a sequence") == 1
  assert list(left.values()) == [2]  # names


def test_davis_with_texts_and_names(tmp_path, imported):
  root = davis(tmp_path / "DAVIS")
  write(root / "davis_text_annotations/Davis17_annot1.txt", 'bike-packing 2 "a man on a bike"\n')
  write(root / "davis_semantics.json", {"bike-packing": {"1": "backpack", "2": "person"}})
  items, _ = imported(root, "davis", media=root)
  assert talk(items[1]) == ["<video>\nPlease describe <region>.", "a man on a bike"]
  assert talk(items[2]) == ["<video>\nWhat is <region>?", "backpack"]


def test_youtube_vos(tmp_path, imported):
  palette(tmp_path / "train/Annotations/0a/00000.png", np.where(MASK, 3, 0))
  frames(tmp_path / "train/JPEGImages/0a", ["00000.jpg", "00005.jpg"])
  meta = {"videos": {"0a": {"objects": {"3": {"category": "penguin", "frames": ["00000"]}}}}}
  write(tmp_path / "train/meta.json", meta)
  items, left = imported(tmp_path / "train", "davis", media=tmp_path / "train")
  assert (talk(items[0])[1], left) == ("penguin", {})
  spoken = {"videos": {"0a": {"expressions": {"0": {"exp": "a bird", "obj_id": "3"}}}}}
  captions = write(tmp_path / "meta_expressions.json", spoken)
  items, left = imported(tmp_path / "train", "davis", "--captions", captions)
  assert (talk(items[0])[1], len(items), left) == ("a bird", 1, {})


def test_mevis(tmp_path, imported):
  root = tmp_path / "train"
  frames(root / "JPEGImages/0000bf84", ["00000.jpg", "00001.jpg", "00002.jpg"])
  spoken = {
    "0": {"exp": "Two birds flying away", "obj_id": [0, 1], "anno_id": [20, 21]},
    "1": {"exp": "The bird that sits", "obj_id": [1], "anno_id": [21]},
    "2": {"exp": "Nothing", "obj_id": [2], "anno_id": [99]},
    "3": {"exp": "No masks"},
  }
  video = {"expressions": spoken, "vid_id": 12, "frames": ["00000", "00001", "00002"]}
  write(root / "meta_expressions.json", {"videos": {"0000bf84": video}})
  whole = {"size": [24, 32], "counts": [0, 768]}
  write(root / "mask_dict.json", {"20": [COCO_RLE, None, None], "21": [None, whole, COCO_RLE]})
  items, left = imported(root, "mevis", media=root)
  assert [talk(item) for item in items] == [
    ["<video>\nPlease describe <region> and <region>.", "Two birds flying away"],
    ["<video>\nPlease describe <region>.", "The bird that sits"],
  ]
  first, second = masks(items[0])
  assert (list(first), list(second)) == ([0], [1, 2])
  assert np.array_equal(first[0], MASK)
  assert left == {
    "texts about objects that have no mask": 1,
    "expressions without objects (no masks are published)": 1,
  }


CVAT_VIDEO = f"""<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version>
<meta><task><id>7</id><name>street</name><size>40</size><mode>interpolation</mode>
<original_size><width>32</width><height>24</height></original_size>
<source>street.mp4</source></task></meta>
<track id="0" label="car" source="manual">
<box frame="3" keyframe="1" outside="0" occluded="0" xtl="2.5" ytl="3" xbr="10" ybr="8.2">
<attribute name="colour">red</attribute></box>
<box frame="4" keyframe="0" outside="0" occluded="0" xtl="4.5" ytl="3" xbr="12" ybr="8.2"/>
<box frame="5" keyframe="1" outside="1" occluded="0" xtl="4.5" ytl="3" xbr="12" ybr="8.2"/>
</track>
<track id="1" label="person">
<polygon frame="0" keyframe="1" outside="0" points="2.0,2.0;20.0,2.0;20.0,12.0;2.0,12.0"/>
<mask frame="2" keyframe="1" outside="0" rle="{CVAT_RLE}" left="6" top="4" width="24" height="16"/>
</track>
<track id="2" label="path"><polyline frame="0" outside="0" points="1,1;5,5"/></track>
</annotations>"""


def test_cvat_for_video(tmp_path, imported):
  items, left = imported(write(tmp_path / "annotations.xml", CVAT_VIDEO), "cvat")
  (item,) = items
  assert (item["video"], item["height"], item["width"]) == ("street.mp4", 24, 32)
  assert talk(item)[1::2] == ["car", "person"]
  car, person = masks(item)
  assert list(car) == [3, 4]
  assert np.array_equal(car[3], mask_from_box((2.5, 3, 10, 8.2), 24, 32))
  assert person[0].sum() == 180
  assert np.array_equal(person[2], MASK)
  assert left == {"shapes <polyline>": 1, "attributes": 1, "objects without a mask": 1}


CVAT_IMAGES = f"""<annotations><version>1.1</version>
<meta><task><id>7</id><name>street</name><mode>annotation</mode></task></meta>
<image id="0" name="a.png" width="32" height="24">
<tag label="indoor" source="manual"></tag>
<box label="car" occluded="0" xtl="10" ytl="8" xbr="20" ybr="12" rotation="90.0" z_order="0"/>
<ellipse label="ball" cx="16" cy="12" rx="6" ry="4"/>
<mask label="dog" rle="{CVAT_RLE}" left="6" top="4" width="24" height="16" z_order="0"/>
</image>
</annotations>"""


def test_cvat_for_images_in_its_archive(tmp_path, imported):
  source = tmp_path / "job.zip"
  with zipfile.ZipFile(source, "w") as archive:
    archive.writestr("annotations.xml", CVAT_IMAGES)
  frames(tmp_path / "images", ["a.png"])
  items, left = imported(source, "cvat", media=tmp_path / "images")
  assert talk(items[0])[1::2] == ["car", "ball", "dog"]
  car, ball, dog = (by_frame[0] for by_frame in masks(items[0]))
  assert np.array_equal(car, mask_from_box((13, 5, 17, 15), 24, 32))
  assert abs(int(ball.sum()) - np.pi * 24) < 4
  assert np.array_equal(dog, MASK)
  assert left == {"tags": 1}


def test_cvat_jobs_without_a_size(tmp_path, imported):
  """Boxes need none; the rest takes that of the video, where it is there."""
  text = CVAT_VIDEO.replace("task>", "job>").replace("<name>street</name>", "")
  head, _, rest = text.partition("<original_size>")
  text = head + rest.partition("</original_size>")[2].replace("street.mp4", "cat.ts")
  source = write(tmp_path / "annotations.xml", text)
  items, left = imported(source, "cvat")
  assert items[0]["annotation"][0]["3"] == {"box": [2.5, 3, 10, 8.2]}
  assert left["polygons on media of unknown size"] == 1
  assert left["masks on media of unknown size (give --media DIR)"] == 1
  (tmp_path / "cat.ts").write_bytes(CLIP.read_bytes())
  items, left = imported(source, "cvat", media=tmp_path)
  assert [list(by_frame) for by_frame in masks(items[0])] == [[3, 4], [0, 2]]


def test_cvat_frames_of_a_video_exported_as_images(tmp_path, imported):
  text = CVAT_IMAGES.replace("</task>", "<source>v.mp4</source></task>").replace(
    'name="a.png"', 'name="frame_000012"'
  )
  items, _ = imported(write(tmp_path / "a.xml", text), "cvat")
  assert items[0]["video"] == "v.mp4"
  assert [list(by_frame) for by_frame in masks(items[0])] == [[12]] * 3


def label_studio(*results: dict, **data: str) -> list:
  cancelled = {"id": 1, "was_cancelled": True, "result": []}
  annotation = {"id": 2, "was_cancelled": False, "result": list(results)}
  return [{"id": 101, "data": data, "annotations": [cancelled, annotation], "predictions": []}]


def shape(kind: str, key: str, to_name: str = "image", **value) -> dict:
  size = {"original_width": 32, "original_height": 24, "image_rotation": 0}
  return {"id": key, "type": kind, "from_name": "x", "to_name": to_name, "value": value, **size}


def test_label_studio_images(tmp_path, imported):
  results = [
    shape("rectanglelabels", "r", x=25, y=25, width=50, height=25, rotation=0,
          rectanglelabels=["Car"]),
    shape("polygonlabels", "p", points=[[6.25, 12.5], [62.5, 12.5], [62.5, 50], [6.25, 50]],
          polygonlabels=["Dog"]),
    shape("brushlabels", "b", format="rle", rle=LABEL_STUDIO_RLE, brushlabels=["Man"]),
    shape("ellipse", "e", x=50, y=50, radiusX=18.75, radiusY=100 / 6, rotation=0),
    shape("labels", "e", x=50, y=50, labels=["Ball"]),
    shape("rectanglelabels", "t", x=50, y=25, width=12.5, height=50, rotation=90,
          rectanglelabels=["Turned"]),
    shape("keypointlabels", "k", x=1, y=1, width=1, keypointlabels=["Eye"]),
    shape("brushlabels", "broken", format="rle", rle=LABEL_STUDIO_RLE[:40], brushlabels=["X"]),
    {"id": "b", "type": "textarea", "to_name": "image", "value": {"text": ["a man who waves"]}},
    {"id": "w", "type": "textarea", "to_name": "image", "value": {"text": ["A street."]}},
    {"id": "c", "type": "choices", "to_name": "image", "value": {"choices": ["Day"]}},
  ]  # fmt: skip
  tasks = label_studio(*results, image="/data/upload/1/ab12cd34-a%20b.jpg", note="x")
  frames(tmp_path / "media/upload/1", ["ab12cd34-a%20b.jpg"])
  source = write(tmp_path / "project.json", tasks)
  items, left = imported(source, "label-studio", "--media", tmp_path / "media",
                         media=tmp_path / "media")  # fmt: skip
  assert {item["image"] for item in items} == {"upload/1/ab12cd34-a%20b.jpg"}
  assert [talk(item)[1] for item in items] == ["a man who waves", "A street.", "Car"]
  assert np.array_equal(masks(items[0])[0][0], MASK)
  assert talk(items[2])[1::2] == ["Car", "Dog", "Ball", "Turned"]
  car, dog, ball, turned = (by_frame[0] for by_frame in masks(items[2]))
  assert np.array_equal(car, mask_from_box((8, 6, 24, 12), 24, 32))
  assert dog.sum() == 18 * 9
  assert abs(int(ball.sum()) - np.pi * 24) < 4
  assert np.array_equal(turned, mask_from_box((4, 6, 16, 10), 24, 32))
  assert left == {
    "cancelled annotations": 1,
    "results of type 'keypointlabels'": 1,
    "results of type 'choices'": 1,
    "brushes that cannot be drawn": 1,
    "objects without a mask": 1,
  }


@pytest.mark.parametrize(
  ("address", "path"),
  [
    ("s3://bucket/clips/a%20b.mp4", "clips/a b.mp4"),
    ("/data/local-files/?d=clips/a.mp4", "clips/a.mp4"),
    ("https://host:8080/x/a.mp4?token=1", "x/a.mp4"),
    ("/mnt/../a.mp4", "mnt/a.mp4"),
  ],
)
def test_addresses_of_label_studio(tmp_path, imported, address, path):
  box = shape("rectangle", "r", to_name="v", x=0, y=0, width=50, height=50)
  source = write(tmp_path / "p.json", label_studio(box, video=address))
  assert imported(source, "label-studio")[0][0]["video"] == path


def test_label_studio_videos(tmp_path, imported):
  (tmp_path / "upload/1").mkdir(parents=True)
  (tmp_path / "upload/1/cat.ts").write_bytes(CLIP.read_bytes())
  at = {"x": 0, "y": 25, "width": 25, "height": 50, "rotation": 0}
  value = {
    "framesCount": 80,
    "duration": 3.2,
    "labels": ["Red square"],
    "sequence": [
      {"frame": 1, "enabled": True, "time": 0.04, **at},
      {"frame": 5, "enabled": False, "time": 0.2, **at, "x": 50},
      {"frame": 79, "enabled": True, "time": 3.16, **at, "x": 75},
    ],
  }
  result = shape("videorectangle", "v", to_name="video", **value)
  source = write(tmp_path / "p.json", label_studio(result, video="/data/upload/1/cat.ts"))
  items, _ = imported(source, "label-studio", media=tmp_path)
  (by_frame,) = masks(items[0])
  assert talk(items[0])[1] == "Red square"
  assert list(by_frame) == [0, 1, 2, 3, 4, 78, 79]
  for number, x in {0: 0, 2: 32, 4: 64, 79: 96}.items():
    assert np.array_equal(by_frame[number], mask_from_box((x, 24, x + 32, 72), 96, 128))
  # Label Studio took it for 12.5 frames a second: its frame 3 is shown at 0.16 to 0.24 s.
  halved = shape("videorectangle", "v", to_name="video", **value | {
    "framesCount": 40, "sequence": [{"frame": 3, "enabled": False, **at}]})  # fmt: skip
  write(source, label_studio(halved, video="/data/upload/1/cat.ts"))
  assert list(masks(imported(source, "label-studio", media=tmp_path)[0][0])[0]) == [5]


def test_label_studio_videos_that_are_not_there_have_shares(tmp_path, imported):
  at = {"x": -5, "y": 25, "width": 30, "height": 50}
  still = {"frame": 7, "enabled": False, **at, "rotation": 90}
  sequence = [{"frame": 2, "enabled": True, **at}, {"frame": 4, "enabled": False, **at}, still]
  value = {"framesCount": 80, "duration": 9.0, "sequence": sequence, "labels": ["a"]}
  tasks = label_studio(shape("videorectangle", "v", **value), video="/data/upload/1/none.mp4")
  items, left = imported(write(tmp_path / "p.json", tasks), "label-studio")
  (by_frame,) = items[0]["annotation"]
  assert by_frame == {n: {"box": ["0%", "25%", "25%", "75%"]} for n in "123"}
  assert left["turned and empty boxes on media of unknown size (give --media DIR)"] == 1


def sav(step: int = 4) -> dict:
  masklet = [[COCO_RLE, COCO_RLE], [COCO_RLE, {"size": [24, 32], "counts": [768]}]]
  return {
    "video_id": "sav_000001", "video_duration": 0.25, "video_frame_count": 2.0 * step - 1,
    "video_height": 24.0, "video_width": 32.0, "video_split": "train", "masklet": masklet,
    "masklet_id": [0, 3], "masklet_type": ["manual", "manual"], "masklet_num": 2,
  }  # fmt: skip


def test_sa_v(tmp_path, imported):
  write(tmp_path / "sav_train/sav_000/sav_000001_manual.json", sav())
  write(tmp_path / "sav_train/unrelated.json", [])
  items, left = imported(tmp_path / "sav_train", "sav")
  assert items[0]["video"] == "sav_000/sav_000001.mp4"
  assert [list(by_frame) for by_frame in masks(items[0])] == [[0, 4], [0]]
  assert np.array_equal(masks(items[0])[0][4], MASK)
  assert [count for what, count in left.items() if what.startswith("names")] == [2]
  captions = write(tmp_path / "c.json", {"sav_000001": {"3": "a cat", "0": "a dog"}})
  source = tmp_path / "sav_train/sav_000/sav_000001_manual.json"
  items, left = imported(source, "sav", "--captions", captions)
  assert ([talk(item)[1] for item in items], left) == (["a cat", "a dog"], {})


def test_sa_v_at_the_rate_of_its_masks(tmp_path, imported):
  source = write(tmp_path / "sav_000001_auto.json", sav(step=1) | {"video_frame_count": 2.0})
  assert list(masks(imported(source, "sav")[0][0])[0]) == [0, 1]


def test_dialogues_of_many_objects_are_split(tmp_path, imported):
  content = coco()
  entry = content["annotations"][1]
  content["annotations"] = [entry | {"id": k} for k in range(20)]
  items, _ = imported(write(tmp_path / "a.json", content), "coco")
  assert [len(item["annotation"]) for item in items] == [16, 4]


@pytest.mark.parametrize("corners", [(2.5, 3, 10, 8.2), (-4, -4, 9, 99), (5, 0, 6, 24),
                                     (30, 20, 32, 24), (0, 0, 32, 24)])  # fmt: skip
def test_boxes_cover_what_they_touch(corners):
  held = segmentation_to_mask(box_segmentation(corners, (24, 32), "", Left()))
  assert np.array_equal(held, mask_from_box(corners, 24, 32))
  assert box_segmentation((40, 2, 50, 9), (24, 32), "", Left()) is None


BAD = [
  ("coco", "[1]", "found a list; accepted: an object"),
  ("coco", '{"images": []}', "no key 'annotations'"),
  ("coco", '{"images": [{"id": 1, "file_name": 5}], "annotations": []}', "key 'file_name'"),
  ("coco", '{"annotations": [], "images": [{"id": 1, "file_name": "a", "height": "x"}]}',
   "key 'height': found 'x'"),
  ("coco", '{"images": [], "annotations": [{"image_id": {}}]}', "annotation 0: key 'image_id'"),
  ("coco", '{"images": [], "annotations": []}', "nothing to carry over (no objects and no texts)"),
  ("coco", "{", "cannot be read as JSON"),
  ("ytvis", '{"videos": [{"id": 1, "file_names": 3}]}', "key 'file_names': found a whole number"),
  ("mevis", '{"videos": []}', "key 'videos': found a list"),
  ("cvat", "<a", "cannot be read as CVAT's XML"),
  ("cvat", "<a/>", "found <a>"),
  ("cvat", '<annotations><image id="0" name="a.png" width="w" height="2"/></annotations>',
   "key 'width': found 'w'"),
  ("cvat", CVAT_IMAGES.replace("0, 19, 5", "0, nan, 5"), "value 1: key 'points': found 'nan'"),
  ("cvat", CVAT_VIDEO.replace("2.0,2.0;", "2.0,1e400;"), "value 1: key 'points': found '1e400'"),
  ("label-studio", '{"id": 1}', "found an object; accepted: a list"),
  ("label-studio", '[{"id": 1, "image": "a.jpg", "label": []}]', "no key 'annotations'"),
  ("sav", '{"video_id": "a"}', "no key 'video_height'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "reason"), BAD)
def test_what_is_not_in_the_format_is_one_line(tmp_path, capsys, kind, text, reason):
  source = write(tmp_path / "meta_expressions.json", text)
  write(tmp_path / "mask_dict.json", {})
  out = tmp_path / "o.json"
  assert cli.main(["data", "import", str(source), "--from", kind, "--out", str(out)]) == 2
  error = capsys.readouterr().err
  assert reason in error
  assert error.count("\n") == 1
  assert not out.exists()


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
  source = write(tmp_path / "a.json", coco())
  words = ["data", "import", str(source), "--from", "coco", "--out", str(source / "o.json")]
  assert cli.main(words) == 2
  assert "o.json: cannot be written (" in capsys.readouterr().err


def test_davis_without_annotations(tmp_path, capsys):
  words = ["data", "import", str(tmp_path), "--from", "davis", "--out", str(tmp_path / "o.json")]
  assert cli.main(words) == 2
  assert "no folder Annotations" in capsys.readouterr().err


# Any value in any place of a file gives items, a count of what is left, or one line.

SOUND = {
  "coco": coco(),
  "ytvis": {
    "videos": [{"id": 1, "file_names": ["a/0.jpg"], "width": 32, "height": 24}],
    "annotations": [{"id": 1, "video_id": 1, "category_id": 1, "segmentations": [COCO_RLE],
                     "bboxes": [[1, 1, 2, 2]]}],
    "categories": [{"id": 1, "name": "x"}],
  },
  "label-studio": label_studio(
    shape("rectanglelabels", "r", x=1, y=1, width=5, height=5, rotation=3, rectanglelabels=["C"]),
    shape("polygonlabels", "p", points=[[1, 1], [9, 1], [9, 9]], polygonlabels=["D"]),
    shape("brushlabels", "b", rle=LABEL_STUDIO_RLE[:20], brushlabels=["M"]),
    {"id": "b", "type": "textarea", "value": {"text": ["a man"]}},
    image="a.jpg",
  ),
  "sav": sav(),
}  # fmt: skip
ODD = (None, True, -1, 1e400, 2**70, 0.5, "", "\ud800", "a\0b", [], [[]], {}, {"a": 1}, [None])


def places(value, path=()):
  yield path
  entries = {dict: dict.items, list: enumerate}.get(type(value), lambda _: ())(value)
  for key, entry in entries:
    if not (isinstance(key, int) and key > 6):
      yield from places(entry, (*path, key))


def replaced_at(value, path, new):
  if not path:
    return new
  copy = dict(value) if isinstance(value, dict) else list(value)
  copy[path[0]] = replaced_at(copy[path[0]], path[1:], new)
  return copy


@pytest.mark.parametrize("kind", SOUND)
def test_odd_values_in_any_place(tmp_path, kind):
  for n, path in enumerate(places(SOUND[kind])):
    for odd in (ODD[3 * n % len(ODD)], ODD[(3 * n + 5) % len(ODD)]):
      text = json.dumps(replaced_at(SOUND[kind], path, odd))
      source = write(tmp_path / "s.json", text)
      with contextlib.suppress(InputError):
        import_items(source, kind, tmp_path / "o.json")
  assert n > 20


def test_every_format_is_tried():
  assert set(FORMATS) == {"coco", "ytvis", "davis", "mevis", "cvat", "label-studio", "sav"}
