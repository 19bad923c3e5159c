"""x86: registers, trap instructions, segments, paging. Plain functions over structs and bytes."""
