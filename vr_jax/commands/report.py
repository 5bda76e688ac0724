"""`vr report`: results as a page and a table."""

from dataclasses import dataclass, field

from vr_jax.evaluation.settings import ReportOptions


@dataclass(frozen=True)
class Report:
  results: tuple[str, ...] = field(
    metadata={"positional": True, "help": "run or result folders", "metavar": "O"}
  )
  out: str = field(default="report", metadata={"help": "folder (default: %(default)s)"})


def run(report: Report, options: ReportOptions) -> None:
  from vr_jax.evaluation.pages.results import write_reports

  for path in write_reports(report.results, report.out, options):
    print(path)
