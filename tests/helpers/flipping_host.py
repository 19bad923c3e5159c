"""What a host says of itself in the handshake, and one that is not honest there."""

from vmibridge.engine.handshake import Feature, Host, HostInfo

INFO = HostInfo(
    features=Feature.WAIT | Feature.QUOTA,
    soft_timeout=0.25,
    timeout=60.0,
    result_timeout=30.0,
    in_flight=17,
)


class FlippingHost(Host):
    """Flips one bit of one register where `handle` of a test says so."""

    def __init__(self, info, side, value, bit):
        super().__init__(info)
        self.side, self.value, self.bit = side, value, bit

    def flip(self, message):
        changed = getattr(message, self.value) ^ 1 << self.bit
        return getattr(message, f"with_{self.value}")(changed)
