"""What the end of a name says of a file or member: image, tar, table."""

from __future__ import annotations

from typing import Final

__all__ = ["IMAGE_EXTENSIONS", "REFUSED_EXTENSIONS", "TABLE_ENDINGS", "TAR_ENDINGS"]

IMAGE_EXTENSIONS: Final = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm pam jp2 j2k j2c jpc jpf jpx avif heic "
    "heif hif ico tga qoi pcx sgi".split()
)
"""Lower case, without the dot: members that are taken for images."""

REFUSED_EXTENSIONS: Final = frozenset("exr hdr ff svg psd dds jxl jxr icns".split())
"""Images that are not decoded: each gets a reason that names its format."""

TAR_ENDINGS: Final = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TABLE_ENDINGS: Final = (".parquet", ".arrow", ".feather")
