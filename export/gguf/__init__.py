"""GGUF: adapters and whole models for llama.cpp, and the proof in it."""
