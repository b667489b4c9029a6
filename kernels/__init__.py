"""Linears that run on packed tensors; knows no scheme."""
