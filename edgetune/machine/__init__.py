"""Finds out what this machine can do: doctor, device checks, benchmarks and the forecast of a run."""
