"""A recording as a backend, and the comparison."""
