"""Core ML packages: writing, app files and the proof by our own evaluator."""
