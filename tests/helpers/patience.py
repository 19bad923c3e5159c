"""How long a test waits for what comes at once on a machine that has nothing else to do."""

HUNG = 300.0
"""Seconds. What has not come by then hangs: on a machine with twenty times as much to do as it can,
and with processes that are stopped for a while, it takes minutes."""
