"""The clips of clients: what is kept, opened and fetched, and what is not."""

import base64
import contextlib
import io
import json
import ssl
import subprocess
import tempfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from data_pipes.video import open_video
from vr_jax.serving import fetching
from vr_jax.serving.body import Node
from vr_jax.serving.chat import Media
from vr_jax.serving.errors import ApiError
from vr_jax.serving.fetching import fetch, is_public
from vr_jax.serving.media import META, MediaOptions, Store


@pytest.fixture
def make_store(tmp_path):
  return lambda **options: Store(MediaOptions(**options), tmp_path / "files")


def media(*addresses):
  return Media(tuple(Node(a, f"messages[0].content[{i}]") for i, a in enumerate(addresses)), 0)


def add(store, path, owner="", name=None):
  with open(path, "rb") as content:
    return store.add(content, name or path.name, "user_data", owner)


def refusal(call, *args):
  with pytest.raises(ApiError) as caught:
    call(*args)
  assert tempfile.gettempdir() not in str(caught.value)
  return caught.value


def data_url(content, kind="video/mp4"):
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(array):
  content = io.BytesIO()
  Image.fromarray(array).save(content, "PNG")
  return content.getvalue()


def test_an_uploaded_file_is_its_owners_and_survives_a_restart(make_store, golden, tmp_path):
  store = make_store()
  path = golden / "media/clip_mp4.mp4"
  medium = add(store, path, "alice", "../cat.mp4")
  assert medium.path.read_bytes() == path.read_bytes()
  assert (medium.info.frames, medium.info.kind, medium.info.playable) == (40, "video", "video/mp4")
  assert store.files("alice") == [medium]
  assert store.bytes == path.stat().st_size
  for owner, file_id in (("bob", medium.id), ("alice", "file-" + "0" * 32)):
    assert refusal(store.get, file_id, owner).status == 404
  (tmp_path / "files" / ("file-" + "1" * 32)).mkdir()  # what a kill in an upload leaves
  again = make_store()
  assert [m.id for m in again.files("alice")] == [medium.id]
  assert np.array_equal(again.get(medium.id, "alice").info.times, medium.info.times)
  assert len(list((tmp_path / "files").iterdir())) == 1
  again.remove(medium.id, "alice")
  assert not list((tmp_path / "files").iterdir())


def test_a_file_is_removed_after_its_hours(make_store, golden):
  store = make_store(file_hours=1e-9)
  medium = add(store, golden / "media/img_a.png")
  assert refusal(store.get, medium.id, "").status == 404


@pytest.mark.parametrize(
  ("name", "kind", "frames"),
  [("clip_gif.gif", "gif", None), ("img_a.png", "image", 1), ("img_b.jpg", "image", 1)],
)
def test_the_content_says_what_a_file_is(make_store, golden, name, kind, frames):
  medium = add(make_store(), golden / "media" / name, name="clip.mp4")
  assert medium.info.kind == kind
  assert frames is None or medium.info.frames == frames


PLAYLISTS = {
  "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
  "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
  "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
  "text": b"hello",
  "empty": b"",
}


@pytest.mark.parametrize("kind", [*PLAYLISTS, "zip", "cut"])
def test_what_is_no_clip_is_refused(make_store, golden, tmp_path, kind):
  path = tmp_path / "clip.mp4"
  if kind == "zip":
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
      archive.writestr("a", b"\0" * (1 << 20))
  elif kind == "cut":
    path.write_bytes((golden / "media/clip_mp4.mp4").read_bytes()[:900])
  else:
    path.write_bytes(PLAYLISTS[kind])
  store = make_store()
  error = refusal(add, store, path)
  assert (error.status, error.code) == (415, "unsupported_media")
  assert not list((tmp_path / "files").iterdir())


def test_limits_of_bytes_pixels_frames_and_seconds(make_store, golden, tmp_path):
  clip = golden / "media/clip_mp4.mp4"
  for options in ({"max_pixels": 100}, {"max_frames": 39}, {"max_seconds": 3.9}):
    error = refusal(add, make_store(**options), clip)
    assert (error.status, error.code) == (413, "too_large")
  bomb = tmp_path / "bomb.png"
  Image.new("1", (30_000, 30_000)).save(bomb)
  assert refusal(add, make_store(), bomb).status == 413
  big = tmp_path / "big.mp4"
  big.write_bytes(b"\0" * ((1 << 20) + 1))
  assert refusal(add, make_store(max_upload=1), big).status == 413
  assert refusal(add, make_store(media_disk=1), big).code == "no_room"


def test_a_data_url_is_known_when_it_comes_again(make_store, golden):
  store = make_store()
  url = data_url((golden / "media/clip_mp4.mp4").read_bytes())
  first = store.resolve(media(url), "alice")
  assert first.path.read_bytes() == (golden / "media/clip_mp4.mp4").read_bytes()
  assert store.resolve(media(url), "alice") is first
  assert store.resolve(media(url), "bob") is not first
  assert store.files("alice") == []  # it is no file that was uploaded
  for address in ("data:video/mp4;base64,####", "data:video/mp4", "data:;base64,", "data:,hello"):
    assert refusal(store.resolve, media(address), "").status in (400, 415)


def test_pictures_whose_transparency_marks_the_object(make_store):
  store = make_store()
  pixels = np.full((20, 30, 4), 200, np.uint8)
  pixels[..., 3] = 0
  pixels[5:10, 5:15, 3] = 255
  marked = data_url(png(pixels), "image/png")
  medium = store.resolve(media(marked), "")
  assert np.array_equal(medium.pictures[1][0], pixels[..., 3] > 0)
  assert medium.source == medium.path
  several = store.resolve(media(marked, marked), "")
  assert (several.info.kind, several.info.frames, len(several.source)) == ("list", 2, 2)
  opaque = data_url(png(np.full((20, 30, 4), 255, np.uint8)), "image/png")
  assert store.resolve(media(opaque), "").pictures is None
  assert refusal(store.resolve, media(marked, opaque), "").param == "messages[0].content[1]"


def test_files_below_a_root_alone(make_store, golden, tmp_path):
  root = tmp_path / "root"
  (root / "inside").mkdir(parents=True)
  clip = root / "inside" / "a b.mp4"
  clip.write_bytes((golden / "media/clip_mp4.mp4").read_bytes())
  secret = tmp_path / "secret.mp4"
  secret.write_bytes(clip.read_bytes())
  (root / "link.mp4").symlink_to(secret)
  (root / "way").symlink_to(tmp_path)
  (root / "frames").mkdir()
  (root / "frames/0.png").symlink_to(golden / "media/img_a.png")
  store = make_store(media_root=(str(root),))
  medium = store.resolve(media(f"file://{root}/inside/a%20b.mp4"), "")
  assert (medium.name, medium.info.frames) == ("inside/a b.mp4", 40)
  assert store.resolve(media(f"file://{root}/inside/a%20b.mp4"), "").info is medium.info
  for address in (
    f"file://{root}/link.mp4",
    f"file://{root}/way/secret.mp4",
    f"file://{root}/../secret.mp4",
    f"file://{root}/%2e%2e/secret.mp4",
    f"file://{root}/frames",
    f"file://{root}",
    f"file://host{root}/inside/a%20b.mp4",
    "file:///etc/passwd",
    "file:///etc/absent",
    f"file://{root}/a%00b",
  ):
    assert refusal(store.resolve, media(address), "").status == 403, address
  assert refusal(store.resolve, media(f"file://{root}/absent.mp4"), "").status == 404
  assert refusal(make_store().resolve, media(f"file://{clip}"), "").status == 403


@pytest.mark.parametrize(
  "address",
  [
    "http://a/b",
    "clip.mp4",
    "/etc/passwd",
    "ftp://a",
    7,
    None,
    "data:,\ud800",
    "file://[x",
    "https://ü/a",
    "\ud800",
    "file-" * 9999,
  ],
)
def test_other_addresses_are_none(make_store, address):
  error = refusal(make_store().resolve, media(address), "")
  assert error.status == 400
  assert error.param == "messages[0].content[0]"
  json.dumps(error.to_dict(), ensure_ascii=False).encode()


def test_frames_come_by_number(make_store, golden):
  store = make_store()
  path = golden / "media/clip_mp4.mp4"
  medium = add(store, path)
  (frame,) = open_video(path).frames([7])
  for form, width in (("jpeg", None), ("webp", 48)):
    content = store.frame(medium, 7, width, form)
    with Image.open(io.BytesIO(content)) as image:
      assert image.format == form.upper()
      assert image.width == (width or 96)
      difference = np.abs(np.asarray(image.resize((96, 64)), int) - frame).mean()
    assert difference < 16
    assert store.frame(medium, 7, width, form) is content
  assert refusal(store.frame, medium, 40, None, "jpeg").status == 404


def test_what_browsers_do_not_play_has_a_proxy_of_the_same_frames(make_store, golden):
  store = make_store()
  medium = add(store, golden / "media/clip_gif.gif")
  assert not medium.info.playable
  path, kind = store.playable(medium)
  assert kind == "video/mp4"
  assert len(open_video(path)) == medium.info.frames
  assert np.allclose(open_video(path).times, medium.info.times, atol=0.002)
  assert store.playable(medium)[0] == path
  assert refusal(store.playable, add(store, golden / "media/img_a.png")).status == 415


# --- Other hosts


@pytest.mark.parametrize(
  ("address", "public"),
  [
    ("8.8.8.8", True),
    ("2606:4700:4700::1111", True),
    *((a, False) for a in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "0.0.0.0", "100.64.0.1")),
    *((a, False) for a in ("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "224.0.0.1")),
    *((a, False) for a in ("2002:7f00:1::", "64:ff9b::7f00:1", "240.0.0.1")),
  ],
)
def test_addresses_of_the_public_internet(address, public):
  assert is_public(address) == public


@pytest.fixture(scope="module")
def host(tmp_path_factory):
  """An https host on the loopback: its port, the paths that it was asked for, its certificate."""
  folder = tmp_path_factory.mktemp("tls")
  command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
  command += ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
  command += ["-subj", "/CN=media.example", "-addext", "subjectAltName=DNS:media.example"]
  subprocess.run(command, check=True, capture_output=True)
  paths = []

  class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
      paths.append(self.path)
      self.send_response(302 if self.path == "/away" else 200)
      if self.path == "/away":
        self.send_header("location", "https://127.0.0.1/secret")
      self.end_headers()
      with contextlib.suppress(OSError):
        self.wfile.write(b"\0" * (1000 if "a.mp4" in self.path else 100_000))

    def log_message(self, *_):
      pass

  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.socket = context.wrap_socket(server.socket, server_side=True)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server.server_port, paths, folder / "cert.pem"
  server.shutdown()


def test_a_host_that_is_named_is_asked_at_the_address_that_was_checked(host, tmp_path, monkeypatch):
  port, paths, certificate = host
  monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
  monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
  lookups = []

  def resolve(name, number):
    """A name whose address changes: it is looked up once."""
    lookups.append((name, number))
    return ["127.0.0.1"] if len(lookups) == 1 else ["10.0.0.1"]

  hosts, out = [f"media.example:{port}"], tmp_path / "a.mp4"

  def get(path):
    lookups.clear()
    fetch(Node(f"https://media.example:{port}{path}", "url"), hosts, out, 50_000, resolve)

  get("/a.mp4?x=1")
  assert lookups == [("media.example", port)]
  get("/a.mp4")
  assert out.stat().st_size == 1000
  assert refusal(get, "/away").code == "not_fetched"
  assert refusal(get, "/large").code == "too_large"
  assert "/secret" not in paths


def test_a_name_that_leads_into_the_own_network_is_refused_unasked(host, tmp_path):
  port, paths, _ = host
  before = list(paths)
  hosts = [f"media.example:{port}", f"127.0.0.1:{port}", f"localhost:{port}"]
  for addresses in (["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], []):
    node = Node(f"https://media.example:{port}/a.mp4", "url")
    error = refusal(fetch, node, hosts, tmp_path / "a", 50_000, lambda *_, a=addresses: a)
    assert (error.status, error.code) == (403, "host_not_allowed")
  for address in (f"https://127.0.0.1:{port}/a.mp4", f"https://localhost:{port}/a.mp4"):
    assert refusal(fetch, Node(address, "url"), hosts, tmp_path / "a", 50_000).status == 403
  for address in ("https://other.example/a", f"https://media.example@other:{port}/", "https://[x/"):
    error = refusal(fetch, Node(address, "url"), hosts, tmp_path / "a", 50_000)
    assert error.status in (400, 403)
  assert paths == before


def test_no_host_is_asked_unless_it_is_named(make_store):
  error = refusal(make_store().resolve, media("https://media.example/a.mp4"), "")
  assert (error.status, error.param) == (403, "messages[0].content[0]")


def test_the_description_beside_a_file_is_json(make_store, golden):
  medium = add(make_store(), golden / "media/clip_mp4.mp4")
  record = json.loads((medium.path.parent / META).read_text())
  assert record["name"] == "clip_mp4.mp4"
