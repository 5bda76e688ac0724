"""What a client is answered where a request cannot be: an HTTP status and OpenAI's error object."""

from collections.abc import Mapping
from typing import Any

from data_pipes.errors import one_line

TYPES = {
  401: "authentication_error",
  403: "permission_error",
  404: "not_found_error",
  429: "rate_limit_error",
  500: "server_error",
  503: "overloaded_error",
}
RETRY_SECONDS = 1  # that a client is asked to wait


class ApiError(Exception):
  """A request that is refused.

  Attributes:
    status: of HTTP.
    param: the path of what is wrong in the body, such as `messages[0].content[2].region.frame`.
    code: a word that programs tell cases apart by.
    headers: of the response.
  """

  def __init__(
    self, status: int, message: str, *, param: str | None = None, code: str | None = None
  ):
    super().__init__(_encodable(one_line(message, 600)))
    self.status, self.code = status, code
    self.param = None if param is None else _encodable(param[:600])

  @property
  def headers(self) -> dict[str, str]:
    if self.status in (429, 503):
      return {"retry-after": str(RETRY_SECONDS)}
    return {"www-authenticate": "Bearer"} if self.status == 401 else {}

  def to_dict(self) -> Mapping[str, Any]:
    kind = TYPES.get(self.status, "invalid_request_error")
    error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
    return {"error": error}


def _encodable(text: str) -> str:
  """Text that UTF-8 can hold: JSON of a client may hold half a surrogate pair."""
  return text.encode("utf-8", "backslashreplace").decode()
