"""Files that lie elsewhere, and the node's cache of them."""
