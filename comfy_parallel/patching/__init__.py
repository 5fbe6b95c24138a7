"""Declared changes of a host: checked, applied, taken back. Knows no slot and no module of the host."""
