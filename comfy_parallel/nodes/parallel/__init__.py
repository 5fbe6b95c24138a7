"""Nodes with which one workflow is computed by several participants, and how its job is shared out."""
