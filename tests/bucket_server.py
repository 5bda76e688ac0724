"""A bucket of Google Cloud Storage on the loopback: gcp-storage-emulator, in memory.

It lacks what tensorstore asks of a bucket: the generation of an object that is read, and writes
that only take place where the object is still of a generation. Both are added here.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from http import HTTPStatus


def serve():
  """Prints the port and serves until the input ends."""
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects

  def generation(storage, bucket, name):
    try:
      return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
      return "0"

  def reading(action):
    def read(request, response, storage, *args, **kwargs):
      name = request.params["object_id"]
      response["x-goog-generation"] = generation(storage, request.params["bucket_name"], name)
      return action(request, response, storage, *args, **kwargs)

    return read

  def writing(action):
    def write(request, response, storage, *args, **kwargs):
      name = request.params.get("object_id") or request.query.get("name", [""])[0]
      (expected,) = request.query.get("ifGenerationMatch", [None])
      if expected not in (None, generation(storage, request.params["bucket_name"], name)):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return None
      return action(request, response, storage, *args, **kwargs)

    return write

  objects.download = reading(objects.download)
  objects.insert, objects.delete = writing(objects.insert), writing(objects.delete)
  from gcp_storage_emulator.server import create_server

  server = create_server("localhost", 0, in_memory=True, default_bucket="bucket")
  server.start()
  print(server._api._httpd.socket.getsockname()[1], flush=True)
  sys.stdin.read()
  os._exit(0)


@contextmanager
def bucket():
  """Serves gs://bucket in a process of its own; gives the variables that lead there."""
  with subprocess.Popen(
    [sys.executable, __file__],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  ) as process:
    url = f"http://localhost:{process.stdout.readline().strip()}"
    try:
      # gcsfs and Google's client read the first, tensorstore the second.
      yield {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    finally:
      process.stdin.close()


if __name__ == "__main__":
  serve()
