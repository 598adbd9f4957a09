"""Diagnostics of grokking for PyTorch Lightning."""
