"""A VM as the host sees it: its traps, its backend, its memory."""
