"""Chat requests in OpenAI's shape: what is understood, and how what is wrong is named."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.masks import encode_mask
from vr_jax.inference.regions import Region, objects_of
from vr_jax.serving.body import Node, parse
from vr_jax.serving.chat import read_chat
from vr_jax.serving.clips import ClipInfo
from vr_jax.serving.errors import ApiError
from vr_jax.serving.media import Medium
from vr_jax.serving.objects import to_request

HEIGHT, WIDTH, FRAMES = 48, 64, 20
INFO = ClipInfo("video", FRAMES, 10.0, (HEIGHT, WIDTH), np.arange(FRAMES) / 10)
MEDIUM = Medium("cat.mp4", Path("/srv/secret/clip.mp4"), INFO)
BOX = {"box": [6, 6, 40, 44], "frame": 3}
VIDEO = {"type": "video_url", "video_url": {"url": "file-" + "0" * 32}}


def user(*parts):
  return {"role": "user", "content": list(parts)}


def text(words):
  return {"type": "text", "text": words}


def region(**fields):
  return {"type": "region", "region": fields}


def body(*messages, **fields):
  return {"model": "vr-mini", "messages": list(messages), **fields}


def request_of(record, medium=MEDIUM):
  return to_request(read_chat(Node(record, "")), medium)


def refused(record, medium=MEDIUM):
  with pytest.raises(ApiError) as caught:
    request_of(record, medium)
  assert "/srv" not in str(caught.value)
  return caught.value


def masks_of(request):
  """What the regions of a request mark: a list of {frame: pixels} by object."""
  marked = objects_of(request.regions, INFO.video("cat.mp4"))
  return [{n: mask.tolist() for n, mask in one.masks.items()} for one in marked]


def png(array, **options):
  content = io.BytesIO()
  Image.fromarray(array).save(content, "PNG", **options)
  return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[6:44, 6:40] = 1
# Each form of a region with the SPEC-like Region that marks the same.
SHAPES = [
  ({"box": [6, 6, 40, 44]}, Region(box=(6, 6, 40, 44), frame=3)),
  (
    {"box": [0.25, 0.25, 0.5, 0.75], "coordinates": "relative"},
    Region(box=(16, 12, 32, 36), frame=3),
  ),
  ({"point": [20, 20]}, Region(point=(20, 20), frame=3)),
  ({"points": [[20, 20, 1]]}, Region(point=(20, 20), frame=3)),
  ({"polygon": [6, 6, 40, 6, 40, 44]}, Region(rle=[[6, 6, 40, 6, 40, 44]], frame=3)),
  ({"polygon": [[6, 6], [40, 6], [40, 44]]}, Region(rle=[[6, 6, 40, 6, 40, 44]], frame=3)),
  ({"rle": encode_mask(MASK)}, Region(mask=MASK, frame=3)),
  ({"mask": png(MASK * 255)}, Region(mask=MASK, frame=3)),
]


@pytest.mark.parametrize(
  ("shape", "expected"), SHAPES, ids=lambda one: "/".join(one) if isinstance(one, dict) else ""
)
def test_every_form_of_a_region_marks_what_the_command_line_marks(shape, expected):
  asked = request_of(body(user(VIDEO, text("What is <region>?"), region(frame=3, **shape))))
  (drawn,) = objects_of([expected], INFO.video("cat.mp4"))
  assert masks_of(asked) == [{3: drawn.masks[3].tolist()}]


def test_masks_of_several_frames_and_points_that_are_no_part():
  rle = encode_mask(MASK)
  asked = request_of(body(user(VIDEO, region(masks={"3": rle, "5": rle}), text("What is it?"))))
  assert masks_of(asked) == [{3: MASK.tolist(), 5: MASK.tolist()}]
  points = [[20, 20, 1], [22, 20, 0]]
  asked = request_of(body(user(VIDEO, region(points=points, frame=3), text("?"))))
  inside = np.array(masks_of(asked)[0][3])
  assert 0 < inside.sum() < np.array(masks_of(request_of(
    body(user(VIDEO, region(point=[20, 20], frame=3), text("?")))))[0][3]).sum()  # fmt: skip


def test_the_ways_of_giving_regions_are_one():
  spec = "What is <region box:6,6,40,44@3>?"
  ways = [
    body(user(VIDEO, text("What is <region>?"), region(**BOX))),
    body(user(VIDEO, text("What is <region>?")), regions=[BOX]),
    body(user(VIDEO, text(spec))),
    body(user(VIDEO, text("What is <region box:6,6,40,44@0.3s>?"))),
    body(user(VIDEO, text("What is"), region(**BOX), text("?"))),
  ]
  asked = [request_of(record) for record in ways]
  assert {one.question for one in asked} == {"What is <region>?"}
  assert all(masks_of(one) == masks_of(asked[0]) for one in asked)
  assert asked[0].video == MEDIUM.path


def test_pictures_mark_the_object_by_their_transparency():
  """As DAM's clients send them: one picture, or the frames of a clip."""
  frame = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
  info = ClipInfo("image", 1, None, (HEIGHT, WIDTH), marked=True)
  still = Medium("a.png", Path("/srv/a.png"), info, pictures=([frame], [MASK]))
  record = body(user(VIDEO, text("<image>\nDescribe the masked region.")))
  asked = request_of(record, still)
  assert asked.question == "Describe the masked region. <region>"
  assert asked.video == still.path
  assert np.array_equal(asked.regions[0].mask, MASK)
  clip = ClipInfo("list", 3, None, (HEIGHT, WIDTH), marked=True)
  several = Medium("a.png", Path("/srv/a.png"), clip, pictures=([frame] * 3, [MASK] * 3))
  asked = request_of(record, several)
  assert len(asked.video) == 3
  assert [r.frame for r in asked.regions] == [0, 1, 2]
  assert refused(body(user(VIDEO, region(**BOX), text("?"))), several).status == 400


def test_objects_are_named_over_turns():
  asked = request_of(
    body(
      {"role": "system", "content": "Be short."},
      user(VIDEO, text("What is <region>?"), region(name="cat", **BOX)),
      {"role": "assistant", "content": "A cat."},
      user(text("Does <region cat> see <region>?"), region(name="cup", point=[20, 20], frame=5)),
    )
  )
  assert asked.system == "Be short."
  (turn,) = asked.turns
  assert (turn.question, turn.answer) == ("What is <region>?", "A cat.")
  assert asked.question == "Does <region> see <region>?"
  assert [(r.name, r.frame) for r in asked.regions] == [("cat", 3), ("cup", 5)]


def test_regions_of_one_name_are_one_object_and_may_be_mentioned_twice():
  second = {**BOX, "frame": 5}
  asked = request_of(
    body(
      user(
        VIDEO,
        text("Is <region cat> above <region> or is <region cat> below?"),
        region(name="cat", **BOX),
        region(name="cat", **second),
        region(**BOX),
      )
    )
  )
  marked = objects_of(asked.regions, INFO.video("cat.mp4"))
  assert [(m.name, sorted(m.masks)) for m in marked] == [
    ("cat", [3, 5]),
    ("object 1", [3]),
    ("cat (2)", [3, 5]),
  ]


def test_options_are_read_and_ignored_fields_accepted():
  chat = read_chat(
    Node(
      body(
        user(text("Hello?")),
        max_completion_tokens=5, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop="x",
        repetition_penalty=1.1, logprobs=True, top_logprobs=2, user="u", store=False, n=1,
        metadata={"a": "b"}, tools=[], response_format={"type": "text"}, max_tokens=None,
        vr={"mask_rule": "area"}, mm_processor_kwargs={"num_frames": 4},
        stream=True, stream_options={"include_usage": True},
      ),
      "",
    )
  )  # fmt: skip
  assert chat.options == {
    "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ("x",),
    "repetition_penalty": 1.1, "logprobs": 2, "mask_rule": "area", "scene_frames": 4,
  }  # fmt: skip
  assert chat.stream
  assert chat.include_usage
  assert to_request(chat, None).video is None


MESSAGE = user(VIDEO, text("What is <region>?"), region(**BOX))
# Bodies, the path that the refusal names, and words of it.
BAD = [
  ({"messages": [MESSAGE]}, "model", "name of a model"),
  ({"model": "m"}, "messages", "a list of messages"),
  (body(), "messages", "list of 1 to"),
  (body(MESSAGE, region=[BOX]), "region", "did you mean 'regions'"),
  (body(MESSAGE, temprature=1), "temprature", "did you mean 'temperature'"),
  (body(MESSAGE, **{"\ud800": 1}), "\\ud800", "unknown field"),
  (body(MESSAGE, n=2), "n", "not supported"),
  (body(MESSAGE, tools=[{"type": "function"}]), "tools", "not supported"),
  (body(MESSAGE, response_format={"type": "json_object"}), "response_format", "not supported"),
  (body(MESSAGE, max_tokens=0), "max_tokens", "whole number from 1"),
  (body(MESSAGE, max_tokens=10**40), "max_tokens", "whole number from 1"),
  (body(MESSAGE, max_tokens=4, max_completion_tokens=5), "max_completion_tokens", "one of them"),
  (body(MESSAGE, temperature=2.5), "temperature", "from 0 to 2"),
  (body(MESSAGE, temperature="hot"), "temperature", "a number"),
  (body(MESSAGE, temperature=True), "temperature", "a number"),
  (body(MESSAGE, top_p=0), "top_p", "a number"),
  (body(MESSAGE, stop=["a"] * 5), "stop", "up to 4"),
  (body(MESSAGE, stop=[""]), "stop[0]", "text"),
  (body(MESSAGE, top_logprobs=2), "top_logprobs", "logprobs"),
  (body(MESSAGE, logprobs=True, top_logprobs=6), "top_logprobs", "from 0 to 5"),
  (body(MESSAGE, stream_options={"include_usage": True}), "stream_options", "stream"),
  (body(MESSAGE, stream=1), "stream", "true, false"),
  (body(MESSAGE, vr={"frames": 3}), "vr.frames", "scene_frames"),
  (body(MESSAGE, vr={"propagate": {}}), "vr.propagate", "not supported"),
  (body({"role": "tool", "content": "x"}), "messages[0].role", "user, assistant"),
  (body({"role": "assistant", "content": "x"}), "messages", "by turns"),
  (body(MESSAGE, MESSAGE), "messages[1].content[0].video_url.url", "a second video"),
  (body({"role": "system", "content": "x"}), "messages[0]", "of the user"),
  (body({"role": "user", "content": ""}), "messages[0].content", "text"),
  (body({"role": "user", "content": "\ud800"}), "messages[0].content", "surrogate"),
  (body(user({"type": "audio"})), "messages[0].content[0].type", "video_url"),
  (body(user(7)), "messages[0].content[0]", "an object"),
  (body(user({"type": "image_url", "image_url": {"uri": "x"}})), 
   "messages[0].content[0].image_url.uri", "url"),
  (body(user(VIDEO, text("<region>"))), "messages[0].content", "without an object"),
  (body(user(VIDEO, text("<region> <region>"), region(**BOX))), "messages[0].content",
   "found 2 <region> but 1 objects"),
  (body(user(VIDEO, text("It?")), regions=[BOX]), "messages[0].content",
   "found 0 <region> but 1 objects"),
  (body(user(VIDEO, text("<region dog>"), region(**BOX))), "messages[0].content", "no such object"),
  (body(user(VIDEO, text("<region /etc/passwd@3>"))), "messages[0].content", "accepted: <region>"),
  (body(user(VIDEO, text("<region mask:x.png@3>"))), "messages[0].content", "accepted: <region>"),
  (body(MESSAGE, regions=[BOX]), "regions", "one way a message"),
  (body(user(VIDEO, text("<region box:1,2,3,4@3>"), region(**BOX))),
   "messages[0].content[2].region", "one way a message"),
]  # fmt: skip
# Regions, the field that the refusal names, and words of it.
BAD_REGIONS = [
  ({"box": [1, 2, 3], "frame": 3}, ".box", "x1,y1,x2,y2"),
  ({"box": [1, 2, 3, "a"], "frame": 3}, ".box", "pixels"),
  ({"box": [1, 2, 3, None], "frame": 3}, ".box[3]", "a number"),
  ({"box": [100, 100, 200, 200], "frame": 3}, ".box", "box"),
  ({"box": [1, 2, 30, 40]}, ".frame", "from 0 to 19"),
  ({"box": [1, 2, 30, 40], "frame": 20}, ".frame", "frames 0 to 19"),
  ({"box": [1, 2, 30, 40], "frame": 10**9}, ".frame", "frames 0 to 19"),
  ({"box": [1, 2, 30, 40], "frame": -1}, ".frame", "frames 0 to 19"),
  ({"box": [1, 2, 30, 40], "frame": "9s"}, ".frame", "lasts"),
  ({"box": [1, 2, 30, 40], "frame": True}, ".frame", "a frame number"),
  ({"box": [1, 2, 30, 40], "frame": [3]}, ".frame", "a frame number"),
  ({"box": [1, 2, 30, 40], "point": [1, 2], "frame": 3}, "", "exactly one of"),
  ({"frame": 3}, "", "exactly one of"),
  ({"box": [1, 2, 30, 40], "frame": 3, "nmae": "x"}, ".nmae", "did you mean 'name'"),
  ({"box": [1, 2, 30, 40], "frame": 3, "name": "x" * 65}, ".name", "up to 64"),
  ({"box": [0, 0, 1, 1], "frame": 3, "coordinates": "percent"}, ".coordinates", "relative"),
  ({"point": [1e308, 2], "frame": 3}, ".point[0]", "everyday"),
  ({"points": [[1, 2, 7]], "frame": 3}, ".points[0][2]", "from 0 to 1"),
  ({"points": [[1, 2, 0]], "frame": 3}, ".points", "empty"),
  ({"polygon": [1, 2, 3], "frame": 3}, ".polygon", "three points"),
  ({"rle": {"size": [2, 2], "counts": [4]}, "frame": 3}, ".rle", "must be equal"),
  ({"rle": {"size": [10**6, 10**6], "counts": [4]}, "frame": 3}, ".rle", "pixels"),
  ({"rle": "/etc/passwd", "frame": 3}, ".rle", "an object"),
  ({"masks": {"x": encode_mask(MASK)}}, ".masks", "frame numbers"),
  ({"masks": {}}, ".masks", "run lengths"),
  ({"mask": "/etc/passwd", "frame": 3}, ".mask", "data:image/png"),
  ({"mask": "data:image/png;base64,####", "frame": 3}, ".mask", "data:image/png"),
  ({"mask": png(np.ones((4, 4), np.uint8) * 255), "frame": 3}, ".mask", "a mask of 4x4"),
  ({"mask": png(MASK * 0), "frame": 3}, ".mask", "empty"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "path", "words"), BAD)
def test_what_is_wrong_is_named_by_its_path(record, path, words):
  error = refused(record)
  assert error.status == 400
  assert error.param == path
  json.dumps(error.to_dict(), ensure_ascii=False).encode()
  assert words in str(error)
  assert error.to_dict()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "field", "words"), BAD_REGIONS)
def test_what_is_wrong_of_a_region_is_named(fields, field, words):
  error = refused(body(user(VIDEO, text("What is <region>?"), region(**fields))))
  assert error.param == f"messages[0].content[2].region{field}"
  assert words in str(error)


def test_a_region_needs_a_video():
  error = refused(body(user(text("<region>"), region(**BOX))), None)
  assert error.param == "messages[0].content[1].region"


def test_an_object_that_is_not_kept_is_not_found():
  error = refused(body(user(VIDEO, text("<region>"), region(object="obj-1", frame=3))))
  assert (error.status, error.param) == (
    404,
    "messages[0].content[1].region.object".replace("1]", "2]"),
  )


@pytest.mark.parametrize(
  "content", ["", "[]", "{", '{"a": NaN}', '{"a": Infinity}', "[" * 100_000, "1" * 5000, "null"]
)
def test_what_is_no_json_object_is_refused(content):
  with pytest.raises(ApiError) as caught:
    parse(content)
  assert caught.value.code == "invalid_json"
  assert json.dumps(caught.value.to_dict())
