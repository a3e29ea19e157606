"""The back ends of ops.py: `reference` in plain torch, `cpu` in C++, `cuda` in Triton and `metal` for Apple GPUs.

Each is a module that satisfies ops_types.Backend, and imports nothing above that module.
"""
