"""HTML pages and SVG charts without scripts or external files, shared by the reports."""
