"""Questions to a teacher model and the log of its answers."""
