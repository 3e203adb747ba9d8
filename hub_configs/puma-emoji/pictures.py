"""Pictures of any kind in RGB."""

from PIL import ExifTags, Image, ImageOps


def as_rgb(picture: Image.Image) -> Image.Image:
    """Upright, 16-bit grey in 8 bits, transparent parts on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # `convert` alone would clip it, nearly all to white
        picture = picture.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) of `as_rgb` of it."""
    is_lying = picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
    return picture.size[::-1] if is_lying else picture.size
