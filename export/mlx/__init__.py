"""Write and read mlx-lm adapters, write MLX models, and prove both in mlx-lm."""
