"""Shared weights: one read-only copy of each weight file in RAM, which every slot's models alias."""
