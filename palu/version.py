"""The version: package metadata and records take it from here."""

__version__ = "0.1.0"
