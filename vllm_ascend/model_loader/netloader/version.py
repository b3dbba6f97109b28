"""The version of NetLoader, which setup.py reads without importing it."""

__version__ = "0.1.0"
