"""The end beside the VM."""
