"""Encoded images to the model's pixels."""
