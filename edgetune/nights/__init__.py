"""Nights: what trains by itself while nobody uses the machine."""
