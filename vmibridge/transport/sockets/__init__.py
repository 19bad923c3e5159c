"""Frames over sockets and TLS."""
