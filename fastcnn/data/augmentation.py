"""Light augmentation that preserves labels: one row of parameters an image, applied by one kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

# Columns of the parameters, in the order in which `kernels.cpu.augment_batch` reads them.
FLIP, DY, DX, BRIGHTNESS, CONTRAST, NOISE, CUTOUT_Y, CUTOUT_X, CUTOUT_SIZE = range(9)


@dataclass(frozen=True)
class Augmentation:
    """How far each image of a training batch may be changed.

    Images are flipped, shifted, changed in contrast and brightness, made noisy and cut out, in this order,
    on the scale where pixels lie in [0, 1], and clipped to it.

    Attributes
    ----------
    flip : mirror half of the images left to right
    shift : move by up to this many pixels up, down, left and right; what comes in is 0 (the same as a crop of
        the image padded with `shift` zeros)
    brightness : add up to this much, or take it away
    contrast : scale the distance from the image's mean by a factor in [1 - contrast, 1 + contrast]
    noise : add Gaussian noise with a standard deviation up to this
    cutout : set a square of this many pixels a side, about a random point of the image, to 0 in half of the
        images (DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with
        cutout"; the square is clipped at the border)

    Raises
    ------
    TypeError, ValueError
        If `flip` is no bool, `shift` or `cutout` no int, or an amount is negative or not finite.
    """

    flip: bool = False
    shift: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    cutout: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.flip, (bool, np.bool_)):
            raise TypeError(f"flip: expected a bool, got {self.flip!r}")
        for name in ("shift", "cutout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}: expected a number of pixels, got {value!r}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name}: {value} is negative or not finite")
        if self.contrast > 1:
            raise ValueError(f"contrast: {self.contrast} is above 1, which would turn images into negatives")

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return any(getattr(self, field.name) for field in fields(self))

    def draw(self, rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
        """Parameters for `count` images of (`height`, `width`), (count, 9) float32.

        The columns are flip, dy, dx, brightness, contrast factor, noise, and the cutout's top, left and side.
        All are drawn, whether used or not, so that changing one setting leaves the draws of the others alone.
        """
        uniform = rng.random((count, 9), dtype=np.float32)
        centred = 2 * uniform - 1
        params = np.empty((count, 9), np.float32)
        params[:, FLIP] = (uniform[:, FLIP] < 0.5) & self.flip
        for column in (DY, DX):
            steps = np.floor(uniform[:, column] * (2 * self.shift + 1))
            params[:, column] = np.minimum(steps, 2 * self.shift) - self.shift
        params[:, BRIGHTNESS] = centred[:, BRIGHTNESS] * self.brightness
        params[:, CONTRAST] = 1 + centred[:, CONTRAST] * self.contrast
        params[:, NOISE] = uniform[:, NOISE] * self.noise
        for column, size in ((CUTOUT_Y, height), (CUTOUT_X, width)):
            params[:, column] = np.floor(uniform[:, column] * size) - self.cutout // 2
        params[:, CUTOUT_SIZE] = np.where(uniform[:, CUTOUT_SIZE] < 0.5, self.cutout, 0)
        return params


PRESETS = {
    "none": Augmentation(),
    # Faces and things: mirrored they are still what they were.
    "light": Augmentation(flip=True, shift=3, brightness=0.1, contrast=0.2, noise=0.02, cutout=8),
    # Digits and letters: mirrored they would be others, and half of one is another.
    "digits": Augmentation(shift=2, brightness=0.05, contrast=0.1, noise=0.02),
}


def augmentation(value: Augmentation | str | None) -> Augmentation | None:
    """An `Augmentation`, or one of `PRESETS` by name; None if it changes nothing.

    Raises
    ------
    ValueError, TypeError
        If there is no preset of that name, or `value` is something else.
    """
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"augment: {value!r} is none of {', '.join(PRESETS)}")
        value = PRESETS[value]
    if value is not None and not isinstance(value, Augmentation):
        raise TypeError(f"augment: expected an Augmentation, a preset's name or None, got {value!r}")
    return value if value is not None and value.active else None
