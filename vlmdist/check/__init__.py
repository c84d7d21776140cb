"""The preflight: would this run file train on those GPUs? Needs neither a GPU nor the weights."""
