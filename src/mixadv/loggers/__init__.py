"""Loggers for Lightning's Trainer: the local file metrics.csv, and Weights & Biases."""
