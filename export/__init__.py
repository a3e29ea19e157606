"""Exports for other programs, one module or package per target; imports edgetune.runtime only.

targets.py lists the targets and describes one as a TargetSpec; job.py defines what a target receives and returns; memory.py
forecasts its peak memory; verify.py proves what it wrote with the target's own reader. merge.py adds the adapter to the base
one linear at a time; rounding.py rounds the result to 4 bits; effect.py measures how much of the adapter that leaves.
"""
