"""Arithmetic and its flags, by the manual (Intel SDM volume 1, 3.4.3 and appendix A)."""

CF, PF, AF, ZF, SF, TF, IF, DF, OF = (1 << at for at in (0, 2, 4, 6, 7, 8, 9, 10, 11))
IOPL, NT, RF, VM, AC, ID = 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 21
ARITHMETIC = CF | PF | AF | ZF | SF | OF
ADD, OR, ADC, SBB, AND, SUB, XOR, CMP = range(8)
"""As opcodes number them."""
SHL, SHR, SAR = 4, 5, 7
_PARITY = [PF if not value.bit_count() & 1 else 0 for value in range(256)]


def _of_result(value: int, bits: int) -> int:
    return (SF if value >> bits - 1 else 0) | (ZF if not value else 0) | _PARITY[value & 0xFF]


def binary(kind: int, left: int, right: int, size: int, flags: int) -> tuple[int, int]:
    """The result of `left kind right` in `size` bytes, and all flags. AF of AND, OR, XOR is 0."""
    bits = 8 * size
    mask = (1 << bits) - 1
    left, right = left & mask, right & mask
    carry = flags & CF if kind in (ADC, SBB) else 0
    if kind in (ADD, ADC):
        total = left + right + carry
        value = total & mask
        new = (CF if total > mask else 0) | (AF if (left ^ right ^ value) & 16 else 0)
        new |= OF if ~(left ^ right) & (left ^ value) & 1 << bits - 1 else 0
    elif kind in (SUB, SBB, CMP):
        total = left - right - carry
        value = total & mask
        new = (CF if total < 0 else 0) | (AF if (left ^ right ^ value) & 16 else 0)
        new |= OF if (left ^ right) & (left ^ value) & 1 << bits - 1 else 0
    else:
        value = left & right if kind == AND else left | right if kind == OR else left ^ right
        new = 0
    return value, flags & ~ARITHMETIC | new | _of_result(value, bits)


def shift_by_1(kind: int, value: int, size: int, flags: int, af: int) -> tuple[int, int]:
    """The result of SHL, SHR or SAR by 1, and all flags. AF, which is undefined, becomes `af`."""
    bits = 8 * size
    sign = value >> bits - 1 & 1
    if kind == SHL:
        result = value << 1 & (1 << bits) - 1
        new = (CF if sign else 0) | (OF if sign != result >> bits - 1 else 0)
    elif kind == SHR:
        result = value >> 1
        new = (CF if value & 1 else 0) | (OF if sign else 0)
    elif kind == SAR:
        result = value >> 1 | sign << bits - 1
        new = CF if value & 1 else 0
    else:
        raise ValueError(f"shift {kind}")
    return result, flags & ~ARITHMETIC | new | af | _of_result(result, bits)


def condition(number: int, flags: int) -> bool:
    """Whether condition `number` of Jcc and SETcc holds."""
    below, sign = bool(flags & CF), bool(flags & SF) != bool(flags & OF)
    zero = bool(flags & ZF)
    held = (
        bool(flags & OF), below, zero, below or zero, bool(flags & SF), bool(flags & PF), sign,
        sign or zero,
    )[number >> 1]  # fmt: skip
    return held != bool(number & 1)
