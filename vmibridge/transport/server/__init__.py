"""The end that runs the handlers."""
