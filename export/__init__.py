"""Exports, one file a target; this floor uses edgetune.runtime only.

target.py says what a target is, verify.py proves what one wrote with the receiving side's own reader. merge.py sums base and
adapter a linear at a time; rounding.py brings the sum to 4 bits, effect.py measures what that leaves of the adapter.
"""
