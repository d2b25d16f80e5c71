"""The package's version. Not in the root, which imports what imports it."""

__version__ = "0.1.0"
