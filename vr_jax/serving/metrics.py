"""What /metrics tells Prometheus; labels never hold ids or texts."""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vr_jax.inference.requests import Answer

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Counts of the service by the name and help of their metric.
TOTALS = {
  "frames_encoded": ("vr_frames_encoded", "Frames that the vision tower has encoded"),
  "prefix_hits": ("vr_prefix_cache_hits", "Clips whose scene was known"),
  "prefix_misses": ("vr_prefix_cache_misses", "Clips whose scene was not known"),
  "ended_cancelled": ("vr_cancelled", "Requests that nobody waited for any more"),
  "compilations": ("vr_compilations", "Programs compiled since the server was ready"),
}
LEVELS = {
  "running": ("vr_requests_running", "Requests that are being answered"),
  "waiting": ("vr_requests_waiting", "Requests that wait for a row"),
  "rows_busy": ("vr_rows_busy", "Rows of the engine in use"),
  "prefix_cache_bytes": ("vr_prefix_cache_bytes", "Bytes of the known scenes"),
  "media_bytes": ("vr_media_bytes", "Bytes of the clients' files"),
}


class Metrics:
  """The counts of one server."""

  def __init__(self, levels: Callable[[], Mapping[str, float]]):
    """`levels` gives the service's counts by name, nothing before it is ready."""
    self._registry = registry = CollectorRegistry()
    registry.register(_Levels(levels))
    self._requests = Counter(
      "vr_requests", "Requests", ("route", "code", "reason"), registry=registry
    )
    names = {
      "queue": "Waiting before the media are read",
      "decode": "Reading the media",
      "time_to_first_token": "From the request to the first token",
      "inter_token": "Between two tokens of an answer, in the mean",
      "request": "From the request to the end of the answer",
    }
    self._seconds = {
      name: Histogram(f"vr_{name}_seconds", text, buckets=SECONDS, registry=registry)
      for name, text in names.items()
    }
    tokens = {"prompt": "Of prompts", "cached": "Of prompts, computed before", "generated": "New"}
    self._tokens = {
      name: Counter(f"vr_{name}_tokens", f"Tokens: {text}", registry=registry)
      for name, text in tokens.items()
    }
    build = Gauge("vr_build_info", "The version", ("version",), registry=registry)
    build.labels(version("vr-jax")).set(1)

  def request(self, route: str, status: int, seconds: float, reason: str = "") -> None:
    """Counts a response of a route."""
    self._requests.labels(route, str(status), reason).inc()

  def answer(self, answer: Answer) -> None:
    """Counts an answer's tokens and times."""
    usage, timings = answer.usage, answer.timings
    if usage is not None:
      self._tokens["prompt"].inc(usage.prompt)
      self._tokens["cached"].inc(usage.cached)
      self._tokens["generated"].inc(usage.completion)
    if timings is not None:
      self._seconds["queue"].observe(timings.queue)
      self._seconds["decode"].observe(timings.media)
      self._seconds["time_to_first_token"].observe(timings.first_token)
      self._seconds["request"].observe(timings.total)
      if len(answer.token_ids) > 1:
        steps = len(answer.token_ids) - 1
        self._seconds["inter_token"].observe((timings.total - timings.first_token) / steps)

  def text(self) -> bytes:
    return generate_latest(self._registry)


class _Levels:
  """The service's counts at the moment of a scrape."""

  def __init__(self, levels: Callable[[], Mapping[str, float]]):
    self._levels = levels

  def collect(self) -> Iterator[Metric]:
    levels = self._levels()
    for key, (name, text) in TOTALS.items():
      yield CounterMetricFamily(name, text, value=levels.get(key, 0))
    for key, (name, text) in LEVELS.items():
      yield GaugeMetricFamily(name, text, value=levels.get(key, 0))
