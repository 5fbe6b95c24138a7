"""Node packs: what they keep for the whole process, and how each slot gets its own of it."""
