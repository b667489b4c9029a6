"""Tensors to packed tensors and back; knows no model."""
