"""Exports, one file a target; this floor uses edgetune.runtime only."""
