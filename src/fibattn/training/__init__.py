"""Training: recipes, a thin Trainer, checkpoints that are whole or absent."""
