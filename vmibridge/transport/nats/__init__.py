"""Both ends over NATS."""
