"""A host that is not honest in its handshake."""

from vmibridge.engine.handshake import Host


class FlippingHost(Host):
    """Flips one bit of one register where `handle` of a test says so."""

    def __init__(self, info, side, value, bit):
        super().__init__(info)
        self.side, self.value, self.bit = side, value, bit

    def flip(self, message):
        changed = getattr(message, self.value) ^ 1 << self.bit
        return getattr(message, f"with_{self.value}")(changed)
