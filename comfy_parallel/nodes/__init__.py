"""Nodes that spread one model over several devices."""
