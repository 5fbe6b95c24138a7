"""Weight files in RAM: one copy for all slots."""
