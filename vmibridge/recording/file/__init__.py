"""MCAP files: written, read, recovered."""
