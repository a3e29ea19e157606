"""The engine: tensors, tokens, weights. It knows no notes, no command line and no network."""
