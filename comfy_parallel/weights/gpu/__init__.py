"""Weights on GPUs: how they get there."""
