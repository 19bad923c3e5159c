"""The backend that emulates a raw x86 image with Unicorn."""
