"""Convert GGUF models, which Ollama, LM Studio and llama.cpp use, to the Hugging Face folders that edgetune trains on."""
