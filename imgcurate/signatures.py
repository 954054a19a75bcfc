"""Say what bytes are by how they begin: a format that is decoded, one that is not, or no image."""

from __future__ import annotations

from typing import Final

__all__ = ["describe_bytes", "format_of", "shown_format", "unsupported"]

_FORMATS: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xffO\xffQ", "JPEG 2000"),
    (b"qoif", "QOI"),
    (b"\x01\xda", "SGI"),
    *((b"P%d" % i, "PPM") for i in range(1, 7)),
)
_UNSUPPORTED: Final = (
    (b"v/1\x01", "EXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"farbfeld", "farbfeld"),
    (b"8BPS", "PSD"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"FORM", "IFF"),
)
_MEDIA_TYPES: Final = (
    (b"%PDF", "application/pdf"),
    (b"%!PS", "application/postscript"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"BZh", "application/x-bzip2"),
    (b"\x28\xb5\x2f\xfd", "application/zstd"),
    (b"7z\xbc\xaf\x27\x1c", "application/x-7z-compressed"),
    (b"Rar!", "application/vnd.rar"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "an ELF program"),
    (b"\x1aE\xdf\xa3", "video/webm"),
    (b"OggS", "application/ogg"),
    (b"ID3", "audio/mpeg"),
    (b"<!doctype html", "text/html"),
    (b"<html", "text/html"),
    (b"<head", "text/html"),
    (b"<body", "text/html"),
    (b"<?xml", "text/xml"),
    (b"{", "application/json"),
)
_HEIF_BRANDS: Final = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})


def format_of(data: bytes) -> str:
    """Return the name of the format that the bytes begin like, ``""`` if it is none that is decoded."""
    if data[4:8] == b"ftyp" and data[8:12] in _AVIF_BRANDS:
        return "AVIF"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIC"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[-18:-2] == b"TRUEVISION-XFILE":
        return "TGA"
    return next((name for signature, name in _FORMATS if data.startswith(signature)), "")


def shown_format(name: str | None) -> str:
    """Return the name of one of Pillow's formats as people write it."""
    return {"JPEG2000": "JPEG 2000", "HEIF": "HEIC"}.get(name or "", name or "image")


def unsupported(data: bytes) -> str:
    """Return the reason if the bytes are an image of a format that is not decoded, else ``""``."""
    if format_of(data) == "HEIC":
        return _heic()
    if b"<svg" in data[:1024].lower():
        return "SVG is not supported"
    name = next((name for signature, name in _UNSUPPORTED if data.startswith(signature)), "")
    return f"{name} is not supported" if name else ""


def _heic() -> str:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        return "HEIC is not supported without pillow-heif: pip install 'imgcurate[heif]'"
    return "damaged HEIC: its header cannot be read"


def describe_bytes(data: bytes) -> str:
    """Say what bytes that are not an image look like: a media type, or their first bytes in hex."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, name in _MEDIA_TYPES:
        if head.startswith(signature.lower()):
            return name
    if data[4:8] == b"ftyp":
        return "video/mp4"
    if data[:4] == b"RIFF" and data[8:12] in (b"AVI ", b"WAVE"):
        return "audio/wav" if data[8:12] == b"WAVE" else "video/x-msvideo"
    if not data.strip(b"\0"):
        return f"{len(data):,} zero bytes"
    try:
        text = data[:512].decode("utf-8", errors="strict" if len(data) <= 512 else "ignore")
    except UnicodeDecodeError:
        text = "\0"
    if all(c.isprintable() or c in "\r\n\t" for c in text):
        return "text/plain"
    return f"unknown format, begins with {data[:8].hex(' ')}"
