"""A server on the loopback that speaks the OpenAI protocol: well, or as badly as it is told.

As a script it serves until killed and prints its port: `python chat_server.py [--latency S]`.
"""

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply:
  """What to answer: a JSON value as content, or raw misbehaviour."""

  def __init__(self, content="", *, status=200, headers=None, raw=None, hang=0.0, close=False,
               refusal=None, finish="stop", trickle=b""):  # fmt: skip
    self.content = content if isinstance(content, str) else json.dumps(content)
    self.status, self.headers, self.raw = status, headers or {}, raw
    self.hang, self.close, self.refusal, self.finish = hang, close, refusal, finish
    self.trickle = trickle  # sent at once; then a byte now and then for ever


class ChatServer:
  """Answers by `answer(body, number of the call) -> Reply`; keeps what it was asked."""

  def __init__(self, answer: Callable[[dict, int], Reply]):
    self.bodies: list[dict] = []
    self.times: list[float] = []
    self.answered: list[str] = []
    self.headers: list[dict] = []
    lock = threading.Lock()
    outer = self

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        length = int(self.headers["content-length"])
        data = self.rfile.read(length)
        if len(data) < length:
          return  # the caller died while it asked
        body = json.loads(data)
        with lock:
          outer.bodies.append(body)
          outer.times.append(time.monotonic())
          outer.headers.append(dict(self.headers))
          number = len(outer.bodies)
        reply = answer(body, number)
        if reply.hang:
          time.sleep(reply.hang)
        if reply.close:
          self.connection.shutdown(socket.SHUT_RDWR)
          self.close_connection = True
          return
        if reply.trickle:
          self.close_connection = True
          with contextlib.suppress(OSError):  # the caller is gone
            self.wfile.write(reply.trickle)
            while True:
              self.wfile.write(b" ")
              time.sleep(0.1)
          return
        message = {"role": "assistant", "content": reply.content, "refusal": reply.refusal}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish}
        usage = {"prompt_tokens": 100, "completion_tokens": 20}
        whole = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}
        data = (json.dumps(whole) if reply.raw is None else reply.raw).encode()
        try:
          self.send_response(reply.status)
          for key, value in reply.headers.items():
            self.send_header(key, value)
          self.send_header("content-length", str(len(data)))
          self.end_headers()
          self.wfile.write(data)
        except OSError:
          return  # the caller is gone
        with lock:
          outer.answered.append(json.dumps(body, sort_keys=True))

      def log_message(self, *args):
        pass

    class Server(ThreadingHTTPServer):
      request_queue_size = 128
      daemon_threads = True

    self.server = Server(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
    self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

  def __enter__(self):
    self.thread.start()
    return self

  def __exit__(self, *args):
    self.server.shutdown()
    self.server.server_close()


def sensible(body: dict, number: int = 0) -> Reply:
  """Plays every role by the name of the schema; its texts fit whatever it is asked about."""
  name = body["response_format"]["json_schema"]["name"]
  content = body["messages"][0]["content"]
  words = content if isinstance(content, str) else content[0]["text"]
  if name == "nouns":
    data = re.search(r"<<<DATA\n(.*)\nDATA>>>", words)
    caption = json.loads(data[1]) if data else ""
    phrases = re.findall(r"\b(?:the|an?) ((?:\w+ ){0,4}(?:ball|star|square|ring|cross|triangle))\b",
                         caption.split(".")[0].lower())  # fmt: skip
    value = {"subjects": list(dict.fromkeys(phrases)) or ["thing"], "others": []}
  elif name == "motion":
    value = {"text": "It moves over the plain ground of the video.", "static": False}
  elif name == "appearance":
    value = {"text": "It is a bright thing of one colour with a clear edge."}
  elif name == "region":
    value = {"text": "It is a bright thing on a dull ground."}
  elif name == "same_object":
    value = {"same_object": True, "reason": "both are bright things", "confidence": 0.9}
  elif name == "caption":
    value = {"detailed": "A bright thing moves over the plain ground.", "short": "A moving thing."}
  else:
    value = {
      "questions": [
        {"question": f"What does {{0}} do{'?' * k}", "answer": "It moves.", "type": kind,
         "objects": [0]}
        for k, kind in enumerate(("basic", "reasoning", "future"))
      ]
    }  # fmt: skip
  return Reply(value)


def serve_fast(latency: float) -> None:
  """An asyncio server with as little work a call as possible, for timing the client."""
  import asyncio

  body = json.dumps({
    "choices": [{"message": {"content": '{"text": "a fine thing to see"}'},
                 "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 20},
  }).encode()  # fmt: skip
  head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
  reply = head % len(body) + body

  async def handle(reader, writer):
    try:
      while True:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
        await reader.readexactly(length)
        await asyncio.sleep(latency)
        writer.write(reply)
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
      writer.close()

  async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

  asyncio.run(main())


if __name__ == "__main__":
  serve_fast(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)
