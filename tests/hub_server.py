"""A small Hub on the loopback: what huggingface_hub asks of it, from folders on disk."""

import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
  """Repositories are folders OWNER/NAME below `root`; each has one commit and the branch main."""

  root: Path
  requests: list[str]
  gated: frozenset[str] = frozenset()
  sizes: Mapping[str, int] = MappingProxyType({})  # of files that are called larger than they are

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = unquote(urlsplit(self.path).path).strip("/")
    self.requests.append(f"{self.command} {path}")
    parts = path.removeprefix("api/models/").split("/")
    repo = "/".join(parts[:2])
    folder = self.root / repo
    if not folder.is_dir():
      return self.refuse(401, "RepoNotFound")
    if repo in self.gated:
      return self.refuse(403, "GatedRepo")
    if len(parts) > 3 and parts[3] not in ("main", COMMIT):
      return self.refuse(404, "RevisionNotFound")
    if parts[2:3] == ["resolve"]:
      name = "/".join(parts[4:])
      body = (folder / name).read_bytes()
      return self.answer(body, "application/octet-stream", self.sizes.get(name))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in files]
    if parts[2:3] == ["tree"]:
      body = [
        {
          "type": "file",
          "path": name,
          "size": self.sizes.get(name, file.stat().st_size),
          "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        }
        for name, file in zip(names, files, strict=True)
      ]
    else:
      body = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
    return self.answer(json.dumps(body).encode(), "application/json")

  def refuse(self, status, code):
    self.send_response(status)
    self.send_header("X-Error-Code", code)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def answer(self, body, kind, size=None):
    self.send_response(200)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(body) if size is None else size))
    self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
    self.send_header("X-Repo-Commit", COMMIT)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def log_message(self, *_):
    pass


@contextmanager
def serve(root):
  """The class of a running hub; its address is `endpoint`."""
  handler = type("Serving", (Hub,), {"root": Path(root), "requests": []})
  server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
  handler.endpoint = f"http://127.0.0.1:{server.server_port}"
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield handler
  server.shutdown()
  server.server_close()
