"""Training runs: begin or resume one, its setup, the loop over steps, checkpoints and the best adapter."""
