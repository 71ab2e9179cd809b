"""Damage that decoders pass over in silence: an end that is missing, a part that is zeros.

A disk that failed, or a download that was never finished, often leaves a file of the right length
whose rest is zero bytes. Pillow then returns a picture, grey or black or of noise from there on.

| format | what is checked |
|---|---|
| PNG | the checksum (CRC-32) of the header, palette and pixels, and the end mark IEND |
| JPEG | the end mark EOI behind the pixels |

Pillow itself notices the end that a JPEG 2000, GIF or compressed TIFF lacks. Not noticed, because
nothing in the file tells: changed bytes, or zeros, inside the pixels of a JPEG, WebP or AVIF (flat
pictures have many zeros there), and in formats without compression (BMP, PPM, TIFF).
"""

import zlib


def damage(data: bytes, kind: str | None) -> str | None:
    """What is wrong with a picture file, to continue a sentence; None if nothing is known.

    Args:
        data: the whole file.
        kind: its format, as Pillow names it.
    """
    if kind == "PNG":
        return _png(data)
    if kind in ("JPEG", "MPO") and not _has_jpeg_end(data):
        return "its end mark is missing"
    return None


def _png(data: bytes) -> str | None:
    """Every chunk is a length, a name, the data and their checksum (PNG 1.2, section 3.2)."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        is_critical = name[:1].isupper()  # section 3.3
        if is_critical and data[end : end + 4] != zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"):
            return f"the checksum of its part {name.decode('latin-1')!r} is wrong"
        if name == b"IEND":
            return None
        at = end + 4
    return "its end mark is missing"


def _has_jpeg_end(data: bytes) -> bool:
    """Whether an end mark EOI follows a scan. Segments are stepped over, since a thumbnail in one
    has an end mark of its own (ITU-T T.81, B.1.1)."""
    at, scanned = 2, False
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        mark = data[at + 1]
        if mark == 0xD9 and scanned:
            return True
        if mark == 0xFF:  # a fill byte
            at += 1
        elif mark in (0x00, 0x01) or 0xD0 <= mark <= 0xD9:  # stuffed, or without a length
            at += 2
        else:
            scanned = scanned or mark == 0xDA
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return False
