"""From a trap to its answer. Knows no backend and no wire."""
