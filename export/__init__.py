"""Exports, one file a target; this floor uses edgetune.runtime only.

target.py says what a target is, verify.py proves what one wrote with the receiving side's own reader.
"""
