"""One answer at the prompt, or a page that gives many: ``vlmdist predict``."""
