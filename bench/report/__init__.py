"""A report of runs: one HTML page with pictures, the pictures alone, Markdown, CSV, and a view for a terminal."""
