"""Conv2d."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .._device import device_of
from ..kernels import checks
from . import init, settings
from ._arrays import float_dtype, images, shown, stored
from .module import Module
from .parameter import Parameter

Pads = tuple[tuple[int, int], tuple[int, int]]

# NumPy's names of PyTorch's padding modes.
_MODES: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _shown_padding(name: str, padding: Any) -> Any:
    """`padding` as a layer shows it: one number stands for two."""
    if not isinstance(padding, str):
        return checks.padding2d(padding) if np.ndim(padding) == 2 else checks.pair(name, padding)
    if padding not in ("valid", "same"):
        raise ValueError(f"{name}: {padding!r} is neither 'valid' nor 'same'")
    return padding


class Conv2d(Module):
    """Two-dimensional convolution (cross-correlation) of images (N, C, H, W) with filters (F, C / groups,
    kH, kW).

    y[n, f, i, j] = bias[f] + sum over c, kh, kw of x[n, c, i * stride + kh * dilation - padding, ...] *
    weight[f, c, kh, kw]

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size, stride, dilation : int or (h, w)
    padding : int, (h, w), ((top, bottom), (left, right)), 'valid' or 'same'
        'same' keeps the image's size at stride 1; of an odd total the larger half goes to the bottom and
        right.
    groups : int
        Channels and filters are cut into this many groups that don't see each other.
    bias : bool
    padding_mode : 'zeros', 'reflect', 'replicate' or 'circular'
        What stands in the padding.
    dtype : float32 or float64

    Attributes
    ----------
    weight, bias : Parameter
        Drawn from U(-b, b), b = 1 / sqrt(C / groups * kH * kW), as in PyTorch.

    Notes
    -----
    torch.nn.Conv2d's signature; the padding of each side is an addition.
    """

    weight: Parameter
    bias: Parameter | None
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    _setting_checks: ClassVar = {
        "in_channels": settings.count,
        "out_channels": settings.count,
        "kernel_size": settings.size,
        "stride": settings.size,
        "padding": _shown_padding,
        "dilation": settings.size,
        "groups": settings.count,
        "padding_mode": settings.choice(*_MODES),
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        dtype: Any = np.float32,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.groups, self.padding_mode, self.padding = groups, padding_mode, padding
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name}: {getattr(self, name)} is not divisible by groups {self.groups}")
        # Each setting is right by itself now; these two also together?
        self._pads  # noqa: B018
        dtype = float_dtype(dtype)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        self.weight = Parameter(np.zeros(shape, dtype), order=(2, 3, 1, 0))
        self.register_parameter("bias", Parameter(np.zeros(self.out_channels, dtype)) if bias else None)
        self.reset_parameters()

    @property
    def _pads(self) -> Pads:
        """((top, bottom), (left, right)): what `padding` means with the other settings."""
        padding = self.padding
        if not isinstance(padding, str):
            return checks.padding2d(padding)
        if padding == "valid":
            return (0, 0), (0, 0)
        if self.stride != (1, 1):
            raise ValueError(f"padding: 'same' is not defined for stride {self.stride}")
        height, width = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return (height // 2, height - height // 2), (width // 2, width - width // 2)

    def reset_parameters(self) -> None:
        """Draw new initial values from the default generator."""
        init.default_(self.weight, self.bias)

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(F, Ho, Wo) for images of (C, H, W).

        Raises
        ------
        ValueError
            If the kernel is larger than the padded image.
        """
        _, height, width = input_shape
        top, left = (
            checks.window_output(size, kernel, stride, pads, dilation)
            for size, kernel, stride, pads, dilation in zip(
                (height, width), self.kernel_size, self.stride, self._pads, self.dilation, strict=True
            )
        )
        return self.out_channels, top, left

    def forward(self, input: np.ndarray) -> np.ndarray:
        """Convolve (N, C, H, W) or (C, H, W)."""
        x = images(input, self.weight.memory, self.in_channels)
        on = device_of(x)
        n, h, w, c = x.shape
        filters, out_h, out_w = self.output_shape((c, h, w))
        padded, pads = self._pad(x)
        y = on.empty((n, out_h, out_w, filters), x.dtype)
        bias = None if self.bias is None else self.bias.memory
        on.kernels.conv2d_forward(
            padded, self.weight.memory, bias, self.stride, pads, self.dilation, self.groups, out=y
        )
        batched = input.ndim == 4
        self._keep(padded, x.shape, y.shape, batched)
        return shown(y, batched)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Add to the gradients of weight and bias; return the input's."""
        x, x_shape, y_shape, batched = self._kept()
        dout = stored(dout, y_shape, x.dtype, batched)
        on = device_of(x)
        pads = self._pads if self.padding_mode == "zeros" else 0
        geometry = (self.stride, pads, self.dilation, self.groups)
        if self.weight.requires_grad:
            on.kernels.conv2d_backward_weight(
                dout, x, self.kernel_size, *geometry, out=self.weight.grad_memory, accumulate=True
            )
        if self.bias is not None and self.bias.requires_grad:
            on.kernels.conv2d_backward_bias(dout, out=self.bias.grad_memory, accumulate=True)
        padded_shape = x.shape
        # The input's memory may now become its gradient's.
        del x
        self._forget()
        if not input_grad:
            return None
        dx = on.empty(padded_shape, dout.dtype)
        on.kernels.conv2d_backward_input(dout, self.weight.memory, padded_shape, *geometry, out=dx)
        return shown(self._unpad(dx, x_shape), batched)

    def _pad(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        """The images for the kernel, and the zeros that it shall add itself."""
        if self.padding_mode == "zeros":
            return x, self._pads
        return device_of(x).padded(x, *self._sources(x.shape)), 0

    def _unpad(self, dx: np.ndarray, x_shape: tuple[int, ...]) -> np.ndarray:
        """The adjoint of `_pad`: add the gradient of every padded pixel to that of the pixel it shows."""
        if self.padding_mode == "zeros":
            return dx
        (top, _), (left, _) = self._pads
        return device_of(dx).unpadded(dx, *self._sources(x_shape), x_shape[1:3], (top, left))

    def _sources(self, x_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = (self._source(x_shape[axis], self._pads[axis - 1]) for axis in (1, 2))
        return rows, columns

    def _source(self, size: int, pads: tuple[int, int]) -> np.ndarray:
        """Which row of the image stands in each row of the padded one."""
        most = {"reflect": size - 1, "circular": size}.get(self.padding_mode)
        if most is not None and max(pads) > most:
            raise ValueError(
                f"padding: {max(pads)} is more than {self.padding_mode!r} can fill from {size} pixels"
            )
        return np.pad(np.arange(size), pads, _MODES[self.padding_mode])

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts.append(f"stride={self.stride}")
        if self.padding != (0, 0):
            parts.append(f"padding={self.padding}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join(parts)
