"""The renderers of events: terminal, HTML report and plots."""
