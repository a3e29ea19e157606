"""Back ends of `ops.py`: `reference` in plain torch, `cpu` in C++, `metal` for Apple GPUs; each offers the same functions."""
