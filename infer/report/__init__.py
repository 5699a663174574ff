"""An ensemble's report: one HTML file with curves, tables, feature importance and the worst errors as pictures."""

from infer.report.write import FILE, ReportSettings, report, write_report

__all__ = ["FILE", "ReportSettings", "report", "write_report"]
