"""Loggers for Lightning's Trainer: the local metrics.csv, and Weights & Biases."""
