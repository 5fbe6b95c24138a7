"""Slots: a device, its queue and its worker, and how jobs get there."""
