"""Training: one loop, run folders, checkpoints."""
