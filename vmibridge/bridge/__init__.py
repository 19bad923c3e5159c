"""The protocol of vmi-utils, and what an author of handlers touches."""
