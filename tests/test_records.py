"""The published JSON and its variants, and one clear line for each defect."""

import json
import tracemalloc

import pytest

from data_pipes import json_items
from data_pipes.errors import InputError
from data_pipes.json_items import read_items
from data_pipes.records import RecordFile, parse_record, read_records

RLE = {"size": [4, 6], "counts": "PP1"}


def _item(**changes):
  item = {
    "id": 7,
    "video": "clip.mp4",
    "conversations": [
      {"from": "human", "value": "<video>\nWhat is <region> doing?"},
      {"from": "gpt", "value": "It waits."},
    ],
    "annotation": [{"3": {"segmentation": RLE}, "1": {"segmentation": None}}],
  }
  item.update(changes)
  return {key: value for key, value in item.items() if value is not ...}


def _asked(text, answer="Yes."):
  return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def test_published_items(golden):
  found = list(read_records(golden / "data/train.json"))
  raw = json.loads((golden / "data/train.json").read_text())
  assert [record.id for record in found] == list(range(8))
  assert [record.media for record in found] == [
    "video", "video", "image", "image", "video", None, "video", "video",
  ]  # fmt: skip
  assert [list(masks) for masks in found[1].objects] == [[0, 2, 4, 5, 7, 9, 11], [2, 4, 5]]
  assert found[1].objects[1][4] == raw[1]["annotation"][1]["4"]["segmentation"]
  assert found[2].size == (50, 70)
  assert [list(masks) for masks in found[2].objects] == [[0], [0]]
  assert found[3].objects == ()
  assert found[5].path == ""
  assert found[5].tag is None
  assert found[6].objects[0][9] is None
  assert isinstance(found[6].objects[0][0]["counts"], list)
  assert found[7].turns[0].role == "gpt"
  assert found[7].where.endswith("train.json: item 7 (id 7)")


def test_objects_keep_the_order_of_the_json():
  record = parse_record(_item(), "f")
  assert list(record.objects[0].items()) == [(3, RLE), (1, None)]


@pytest.mark.parametrize(
  "changes",
  [
    {"annotation": ..., "masks": [{"3": RLE, "1": None}]},
    {"annotation": [[{"3": {"segmentation": RLE}, "1": {}}]]},
    {"annotation": [{"36": {"3": {"segmentation": RLE}, "1": {"segmentation": None}}}]},
    {"annotation": [{"3": {"segmentation": RLE}, "1": {"segmentation": {"counts": None}}}]},
    {"ratio": 0.2, "frame_idx": "3"},
  ],
  ids=["masks", "list in a list", "frame_idx in front", "counts null", "more keys"],
)
def test_variants_give_the_same_objects(changes):
  assert parse_record(_item(**changes), "f").objects == parse_record(_item(), "f").objects


def test_a_box_stands_wherever_a_mask_does():
  box = {"box": [1, 1, 4, 3]}
  for entry in (box, {"segmentation": box}, {"segmentation": None, "box": box["box"]}):
    assert parse_record(_item(annotation=[{"3": entry}]), "f").objects == ({3: box},)
  assert parse_record(_item(annotation=..., masks=[{"3": box}]), "f").objects == ({3: box},)


@pytest.mark.parametrize("question", ["<video>\nIs <region> red?", "Is <region> red?\n<video>"])
def test_the_tag_may_stand_first_or_last(question):
  assert len(parse_record(_item(conversations=_asked(question)), "f").objects) == 1


def test_regions_of_answers_and_later_turns_count():
  turns = [*_asked("<video>\nIs <region> red?", "No, <region> is."), *_asked("And <region>?")]
  mask = {"0": {"segmentation": RLE}}
  assert len(parse_record(_item(conversations=turns, annotation=[mask] * 3), "f").objects) == 3


def test_a_region_in_a_turn_before_the_tag_does_not_count():
  turns = [*_asked("Is <region> red?"), *_asked("<video>\nAnd <region>?")]
  assert len(parse_record(_item(conversations=turns), "f").objects) == 1


def test_image_frames_are_dummies():
  item = _item(
    video=..., image="a.png", conversations=_asked("<image>\nWhat is <region>?"),
    annotation=[{"36": {"segmentation": [[0, 0, 5, 0, 5, 3]]}}], height=4, width=6,
  )  # fmt: skip
  record = parse_record(item, "f")
  assert record.objects == ({0: [[0, 0, 5, 0, 5, 3]]},)
  assert record.size == (4, 6)


def _sft(question, **changes):
  """An item in the SFT format of VideoRefer's successors."""
  return _item(annotation=..., video=["a.mp4"], conversations=_asked(question), **changes)


def test_a_tag_that_the_later_format_leaves_out_is_put_in_front():
  record = parse_record(_sft("Is <region> red?", masks=[{"3": RLE}]), "f")
  assert record.turns[0].text == "<video>\nIs <region> red?"
  assert record.path == "a.mp4"


def test_masks_of_an_image_stand_alone():
  polygon = [[0, 0, 5, 0, 5, 3]]
  item = _sft("<region>, <region>?", image="a.png", masks=[RLE, polygon]) | {"video": None}
  assert parse_record(item, "f").objects == ({0: RLE}, {0: polygon})


def test_an_object_and_frame_each_with_a_region_of_its_own():
  record = parse_record(_sft("<region>, <region>?", masks=[{"3": RLE, "1": RLE}]), "f")
  assert record.objects == ({3: RLE}, {1: RLE})
  assert len(parse_record(_sft("<region>?", masks=[{"3": RLE, "1": RLE}]), "f").objects[0]) == 2


def test_masks_of_a_list_of_pictures_lie_on_the_masked_ones():
  lists = {"timestamps": [0, 0.5], "masked_video": ["c.png", "d.png"]}
  item = _sft("<region>, <region>?", masks=[{"7": RLE}, {"2": RLE}], **lists)
  record = parse_record(item | {"video": ["a.png", "b.png"]}, "f")
  assert record.objects == ({2: RLE}, {3: RLE})
  assert record.frames.times == (0, 0.5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stream": True}, r"found a streaming sample; accepted: key 'stream' unset"),
    ({"annotation": []}, r"found 1 <region> after <video> but 0 annotated objects"),
    ({"annotation": ...}, r"found 1 <region> after <video> but 0 annotated objects"),
    ({"annotation": [{"0": {}}, {"0": {}}]}, r"found 1 <region> after <video> but 2 annotated"),
    ({"conversations": _asked("What?")}, r"found no messages with <video> although key 'video'"),
    (
      {"conversations": [*_asked("<video> <region>"), *_asked("<video>")]},
      r"found 2 messages with <video>.*exactly one",
    ),
    ({"video": ...}, r"found <video> in the text but no media"),
    ({"video": ..., "conversations": _asked("What?")}, r"found 1 annotated objects but no media"),
    ({"image": "a.png"}, r"found keys 'video' and 'image'"),
    ({"video": ["a", "b"]}, r"key 'timestamps': found null; accepted: a list of times in seconds"),
    ({"video": ["a", "b"], "timestamps": [0]}, r"'timestamps': found 1 for 2 pictures"),
    ({"video": ["a", "b"], "timestamps": [0, 1]}, r"found 0 pictures for masks on 2 frames"),
    ({"image": ["a", "b"], "video": ...}, r"key 'image': found a list; accepted: one path"),
    ({"annotation": {}}, r"key 'annotation': found an object; accepted: a list of objects"),
    ({"masks": []}, r"found keys 'annotation' and 'masks'"),
    ({"annotation": [{}]}, r"'annotation', object 0: found an object without frames"),
    ({"annotation": [{"f1": {}}]}, r"object 0: frame key: found 'f1'; accepted: a frame number"),
    ({"annotation": [{"-1": {}}]}, r"object 0: frame key: found '-1'"),
    ({"annotation": [{"3": None, "03": None}]}, r"object 0: two keys name one frame, 3"),
    ({"annotation": [{"0": {"segmentaton": RLE}}]}, r"object 0, frame 0: key 'segmentaton'"),
    ({"annotation": [{"0": {"segmentation": {"size": [4, 6]}}}]}, r"frame 0: key 'size'"),
    ({"annotation": [{"0": {"bbox": [1, 1, 2, 2]}}]}, r"frame 0: key 'bbox'; accepted: segm"),
    ({"annotation": [{"0": {"segmentation": "abc"}}]}, r"object 0, frame 0: segmentation: found t"),
    ({"annotation": [{"0": {"segmentation": [1, 2]}}]}, r"segmentation: found a list"),
    ({"annotation": [{"0": {"counts": "x"}}]}, r"segmentation: .* with keys \['counts'\]"),
    ({"height": 4}, r"keys 'height', 'width': found 4, None"),
    ({"height": 4, "width": "6"}, r"found 4, '6'; accepted: two positive whole numbers"),
    ({"conversations": ...}, r"key 'conversations': found nothing; accepted: a list of messages"),
    ({"conversations": ["hi"]}, r"'conversations', message 0: found text"),
    ({"conversations": [{"from": "bot", "value": ""}]}, r"key 'from': found 'bot'"),
    ({"conversations": _asked("<video> <region>")[:1]}, r"found human; accepted: human, gpt"),
  ],
)
def test_defects_are_named(changes, message):
  with pytest.raises(InputError, match=message) as caught:
    parse_record(_item(**changes), "data.json: item 3")
  text = str(caught.value)
  assert text.startswith("data.json: item 3 (id 7): ")
  assert "accepted: " in text
  assert "\n" not in text


def test_an_image_object_has_one_frame():
  item = _item(
    video=..., image="a.png", conversations=_asked("<image>\n<region>"),
    annotation=[{"0": {"segmentation": RLE}, "1": {"segmentation": RLE}}],
  )  # fmt: skip
  with pytest.raises(InputError, match="found 2 frames; accepted: one"):
    parse_record(item, "f")


def test_an_item_that_is_no_object():
  with pytest.raises(InputError, match="f: item 0: found text"):
    parse_record("x", "f: item 0")


@pytest.fixture(params=[7, 64, 4 << 20])
def block(request, monkeypatch):
  """Read sizes down to a few bytes, so that every place of an item meets the end of a block."""
  monkeypatch.setattr(json_items, "_BLOCK", request.param)


ITEMS = [
  {"a": 'é"}],[{ \\ 你好', "b": [1.5, -2e-3, True, None, {"c": "x" * 300}]},
  {},
  12345,
  "]",
  [[]],
  {"counts": "Y\\14Z14L4M2N2O1N1O2O001N1000"},
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_any_item_is_read_from_its_place(tmp_path, block, indent, ascii_only):
  path = tmp_path / "f.json"
  path.write_text(" \n" + json.dumps(ITEMS, indent=indent, ensure_ascii=ascii_only) + "\n")
  assert list(read_items(path)) == ITEMS
  file = RecordFile(path)
  assert len(file) == len(ITEMS)
  assert [file.item(i) for i in reversed(range(len(file)))] == ITEMS[::-1]


@pytest.mark.parametrize("text", ["[]", " [ \n ] ", "\ufeff[1]"])
def test_short_arrays(tmp_path, block, text):
  (tmp_path / "f.json").write_text(text, encoding="utf-8")
  assert list(read_items(tmp_path / "f.json")) == json.loads(text.removeprefix("\ufeff"))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "after 0 items: found nothing"),
    ('{"a": 1}', "at byte 0, after 0 items: found '{'"),
    ("not json", "found 'n'"),
    ('[{"a": 1}, {"b": "xx', "after 1 items: the file ends inside an item"),
    ('[{"a": 1}, {"b": tr', "after 1 items: the file ends inside an item"),
    ('[{"a": 1},', "after 1 items: the file ends inside the array"),
    ('[{"a": 1}', "after 1 items: the file ends inside the array"),
    ("[", "after 0 items: the file ends inside the array"),
    ('[{"a": 1} {"a": 2}]' + " " * 40, "at byte 10, after 1 items: found '{'"),
    ('[{"a": 1}, {"a" 2}]' + " " * 40, "at byte 16, after 1 items: Expecting ':' delimiter"),
    ('[{"a": 1}] [', "found '\\[' after the array"),
  ],
)
def test_files_that_are_no_array_are_named(tmp_path, block, text, message):
  path = tmp_path / "f.json"
  path.write_text(text)
  with pytest.raises(InputError, match=message) as caught:
    RecordFile(path)
  assert str(caught.value).startswith(f"{path}: ")
  assert "accepted: one JSON array" in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
  path = tmp_path / "f.json"
  path.write_bytes(b'[{}, {"id": "\xe9"}]')
  with pytest.raises(InputError, match=r"item 1: found .*accepted: JSON in UTF-8"):
    list(read_items(path))
  with pytest.raises(InputError, match="item 1: found"):
    RecordFile(path)[1]


def test_an_absent_file_is_named(tmp_path):
  with pytest.raises(InputError, match="no such file"):
    RecordFile(tmp_path / "none.json")


def test_memory_stays_flat(tmp_path):
  path = tmp_path / "big.json"
  item = json.dumps(
    _item(annotation=[{"3": {"segmentation": {"size": [9, 9], "counts": "a" * 9000}}}])
  )
  with open(path, "w") as file:
    file.write("[" + ",\n".join([item] * 3000) + "]")  # 28 MB
  tracemalloc.start()
  file = RecordFile(path)
  held, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(file) == 3000
  assert file[2999].objects[0][3]["counts"] == "a" * 9000
  assert held < 1e6
  assert peak < 25e6  # a few blocks of 4 MB, whatever the file's size


def test_json_lines_and_a_list_of_one_path(tmp_path):
  """As VideoLLaMA 3 writes its annotations."""
  turns = [{"from": "human", "value": "<video>\nWho?"}, {"from": "gpt", "value": "é"}]
  items = [{"id": i, "video": [f"{i}.mp4"], "conversations": turns} for i in range(3)]
  path = tmp_path / "a.jsonl"
  path.write_text(
    "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8"
  )
  file = RecordFile(path)
  assert [file[i].path for i in range(len(file))] == ["0.mp4", "1.mp4", "2.mp4"]
  assert list(read_items(path)) == items
  path.write_text('{"id": 1}\n[2]\n')
  with pytest.raises(InputError, match=r"after 1 items: found '\['; accepted: an object a line"):
    list(read_items(path))
