"""What watches a training: history, checkpoints, the progress display, Weights & Biases, the time estimate."""
