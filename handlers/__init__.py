"""The ready-made handlers, as `vmibridge.handlers` or as files; see `docs/handlers.md`."""
