"""The base models on this machine, and the adapters that were trained for them."""
