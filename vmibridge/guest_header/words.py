"""What a parameter is, in words for a comment."""

from vmibridge.guest_header.model import ParameterModel

__all__ = ["described"]


def described(parameter: ParameterModel, size: str = "") -> str:
    """One line; `size` is what the language calls its length or its capacity."""
    none = " Or none, at address 0." if parameter.optional else ""
    match parameter.kind:
        case "text":
            unit = "UTF-8" if parameter.encoding == "utf-8" else "UTF-16"
            return f"{unit}, at most {parameter.limit} bytes, then a NUL.{none}"
        case "bytes":
            return f"{size} bytes of it, at most {parameter.limit}.{none}"
        case "room":
            return f"room to fill, of {size} bytes, at most {parameter.limit}.{none}"
        case "bool":
            return "true or false."
        case "enum":
            return f"of {parameter.enum}, {_bits(parameter)}."
        case _:
            return f"a number, {_bits(parameter)}."


def _bits(parameter: ParameterModel) -> str:
    return f"{parameter.bits} bits{', signed' if parameter.signed else ''}"
