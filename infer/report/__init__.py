"""An ensemble's report: one HTML file with its curves, tables, importances and worst errors."""

from infer.report.write import REPORT_FILE, ReportSettings, report, write_report

__all__ = ["REPORT_FILE", "ReportSettings", "report", "write_report"]
