"""What is on this machine: base models, and the adapters trained for them."""
