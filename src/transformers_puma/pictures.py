"""Pictures of any kind in RGB."""

from PIL import Image, ImageOps


def as_rgb(picture: Image.Image) -> Image.Image:
    """Upright, 16-bit grey in 8 bits, transparent parts on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # `convert` alone would clip it, nearly all to white
        picture = picture.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
