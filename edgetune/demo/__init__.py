"""The built-in model `demo`: a 16M LLaMA in NF4, as `edgetune quantize` writes it. It shows learning, but cannot answer questions.

This package holds data only; README.md beside this file is the model card. Use it as `--model demo` or `Session.load("demo")`.
"""
