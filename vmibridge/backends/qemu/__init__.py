"""QEMU itself: finding one that is new enough, starting it, its monitor, its memory.

What traps in it is a backend's business; nothing here knows of traps.
"""
