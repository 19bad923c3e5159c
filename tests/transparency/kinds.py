"""What kind of fault a difference speaks of, for figures."""

from transparency.program import Linked


def kinds_of(linked: Linked, differences: list[str]) -> set[str]:
    """The known kinds that one program's differences look like; `other` for none of them."""
    program, text = linked.program, "\n".join(differences)
    plain = program.width == 64 or not program.base
    found = set()
    if ": ip " in text:
        found.add("alias" if plain else "CS base")
    if "rflags" in text:
        found.add("flags")
    if ": width " in text:
        found.add("compat width")
    if "exception" in text and "must be vector 1 " in text and "dr6 0x4000" in text:
        found.add("TF")
    locked = any("0xf0" in line.text for line in linked.lines)
    if locked and ("must not be one" in text or "must be vector 6" in text or "undefined" in text):
        found.add("LOCK")
    if linked.has_patches and ("reason" in text or "length" in text or "must not be one" in text):
        found.add("stale translation")
    return found or {"other"}
