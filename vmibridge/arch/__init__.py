"""x86 as the bridge sees it: register forms, trap instructions, segments, paging.

Plain functions over structs and bytes; nothing here does I/O.
"""

from vmibridge.arch.forms import form_of, is_guest_request, magic_of, read_packet, write_response

__all__ = ["form_of", "is_guest_request", "magic_of", "read_packet", "write_response"]
