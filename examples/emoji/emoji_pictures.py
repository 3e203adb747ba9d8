"""Pictures made from pictures: cut-outs, named colours, and the conditions of conditional generation.

Pictures are uint8 (H, W, 3), RGB on white. Nothing here draws random numbers.
"""

import cv2
import numpy as np

# Hue in degrees at which each named colour is most itself.
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "blue": 215, "purple": 275, "pink": 328}
NEUTRALS = ("brown", "black", "grey", "white")
COLOURS = (*HUES, *NEUTRALS)
DOMINANT = 0.6  # of an object's pixels must have a colour before the object is said to have it
NEARLY_WHITE = 244
MASK_GREY = 128


def silhouette(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool: what the white around an object does not reach; white inside an outline belongs to the object."""
    white = (pixels >= NEARLY_WHITE).all(axis=2).astype(np.uint8)
    framed = np.pad(white, 1, constant_values=1)
    cv2.floodFill(framed, None, (0, 0), 2)
    return framed[1:-1, 1:-1] != 2


def bounding_box(pixels: np.ndarray) -> tuple[int, int, int, int] | None:
    """(x_min, y_min, x_max, y_max) of all that is drawn, the maxima exclusive; None for a white picture."""
    rows, columns = np.nonzero(silhouette(pixels))
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def pixel_colours(pixels: np.ndarray) -> np.ndarray:
    """(H, W) index into `COLOURS` of every pixel, by its hue, saturation and value."""
    hue, saturation, value = np.moveaxis(cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2HSV), 2, 0)
    warm = (hue < 42) | (hue >= 345)
    rules = {
        "black": value < 0.25,
        "white": (saturation < 0.12) & (value > 0.85),
        "grey": saturation < 0.15,
        "brown": warm & (value < 0.72) & ((hue >= 12) & (hue < 42) | (value < 0.45)),
        "pink": (hue >= 305) & (hue < 345) | ((hue >= 345) | (hue < 12)) & (saturation < 0.5) & (value > 0.75),
        "red": (hue >= 345) | (hue < 12),
        "orange": hue < 42,
        "yellow": hue < 68,
        "green": hue < 168,
        "blue": hue < 255,
        "purple": hue < 305,
    }
    return np.select(list(rules.values()), [COLOURS.index(name) for name in rules])


def colour_of(pixels: np.ndarray) -> str:
    """The named colour of most of an object, or "" where no colour is dominant."""
    indices = pixel_colours(pixels)[silhouette(pixels)]
    if not len(indices):
        return ""
    counts = np.bincount(indices, minlength=len(COLOURS))
    return COLOURS[counts.argmax()] if counts.max() >= DOMINANT * len(indices) else ""


def recolour(pixels: np.ndarray, colour: str) -> np.ndarray | None:
    """The object with all hues turned so that it has `colour`; None if it has that already or cannot get it.

    Hues turn together, saturation and brightness stay: whether the result has the colour is checked, not assumed.
    """
    old = colour_of(pixels)
    if old == colour or old not in (*HUES, "brown"):
        return None
    hsv = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    main = silhouette(pixels) & (pixel_colours(pixels) == COLOURS.index(old))
    mean_hue = np.rad2deg(np.angle(np.exp(1j * np.deg2rad(hsv[..., 0][main])).mean()))
    hsv[..., 0] = (hsv[..., 0] + HUES[colour] - mean_hue) % 360
    turned = (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).round().clip(0, 255).astype(np.uint8)
    return turned if colour_of(turned) == colour else None


def canny(pixels: np.ndarray) -> np.ndarray:
    """Canny edges, black on white like a line drawing."""
    edges = cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 100, 200)
    return cv2.cvtColor(255 - edges, cv2.COLOR_GRAY2RGB)


def greyscale(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def masked(pixels: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
    """The picture with a grey square whose top left corner is at (x, y)."""
    result = pixels.copy()
    result[y : y + side, x : x + side] = MASK_GREY
    return result
