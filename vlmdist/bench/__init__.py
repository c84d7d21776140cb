"""How fast a run file trains, measured by training it: ``vlmdist bench``."""
