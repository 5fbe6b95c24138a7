"""Slots beyond threads: workers in processes of their own, and what keeps them running."""
