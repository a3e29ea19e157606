"""The built-in model `demo`: a 16M LLaMA in NF4, as `edgetune quantize` writes it. It shows learning, not answers.

Data only; README.md beside this file is its model card. Reach it as `--model demo` or `Session.load("demo")`.
"""
