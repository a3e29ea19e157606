"""The built-in model `demo`: a 16M LLaMA in NF4, written by `edgetune quantize`. It shows learning; it cannot answer questions.

This package holds data only; README.md beside this file is the model card. Use it as `--model demo` or `Session.load("demo")`.
"""
