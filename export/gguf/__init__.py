"""Write and read GGUF adapters, write GGUF models, and prove both in llama.cpp."""
