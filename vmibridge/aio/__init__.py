"""What the event loops need on the path of every trap; nothing here knows a VM."""
