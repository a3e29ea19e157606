"""MLX: mlx-lm adapters and merged models."""
