"""WebDataset tars and their index, of whoever wrote them."""
