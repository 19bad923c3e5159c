"""One package for each architecture of a guest."""
