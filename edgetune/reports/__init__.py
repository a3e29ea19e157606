"""Renders the events of a run: on the terminal, as JSON lines, and as an HTML report with plots."""
