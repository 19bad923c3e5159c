"""Guests that call through a PCI device whose other end is this process."""
