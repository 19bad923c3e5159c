"""The end beside the VM: takes the traps of a backend, and has a server answer them."""
