"""Back ends of `ops.py`: `reference` in plain torch, `cpu` in C++; each offers the same functions."""
