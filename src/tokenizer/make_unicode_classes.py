"""Writes unicode_classes.inc: the ranges of Unicode letters and numbers as C++ initialisers.

    pip install unicodedata2==16.0.0 && python3 make_unicode_classes.py > unicode_classes.inc

The version is pinned to 16.0 because the regex engines of the systems whose ids we reproduce use it.
"""

import unicodedata2

assert unicodedata2.unidata_version == "16.0.0", unicodedata2.unidata_version


def ranges(letter):
    """Inclusive ranges of the code points whose general category starts with `letter`."""
    out = []
    for code in range(0x110000):
        if unicodedata2.category(chr(code))[0] != letter:
            continue
        if out and out[-1][1] == code - 1:
            out[-1][1] = code
        else:
            out.append([code, code])
    return out


print("// Unicode 16.0. Written by make_unicode_classes.py; not to be edited.")
for name, letter in (("kLetterRanges", "L"), ("kNumberRanges", "N")):
    line = f"constexpr CodeRange {name}[] = {{"
    print(line)
    line = "   "
    for first, last in ranges(letter):
        item = f" {{0x{first:X}, 0x{last:X}}},"
        if len(line) + len(item) > 110:
            print(line)
            line = "   "
        line += item
    print(line)
    print("};")
