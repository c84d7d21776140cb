"""The page that shows a run: what was trained, how it went, how well it answers."""
