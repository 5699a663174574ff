"""An ensemble's report: one HTML file with its curves, tables, importances and worst errors."""
