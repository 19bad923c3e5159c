"""What the event loops need on the way of every trap; nothing here knows a VM."""
