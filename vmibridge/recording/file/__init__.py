"""MCAP files: written, read, recovered."""

from vmibridge.errors import MissingExtraError

# Here, and not only in `vmibridge.recording`: where that could not be imported, this package stays
# imported, and its modules would say what they lack in words of Python.
try:
    import mcap
    import zstandard
except ModuleNotFoundError as _error:
    raise MissingExtraError("a recording", "recording") from _error

del mcap, zstandard
