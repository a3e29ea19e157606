"""What this machine can do: doctor, device checks, benchmarks and the forecast of a run."""
