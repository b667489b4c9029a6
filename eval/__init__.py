"""Scoring: what compression cost."""
