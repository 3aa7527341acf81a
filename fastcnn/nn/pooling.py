"""MaxPool2d, AvgPool2d and AdaptiveAvgPool2d."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .._device import device_of, host
from ..kernels import checks
from . import settings
from ._arrays import images, shown, stored
from .module import Module


def pool_output(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """Number of windows along one axis.

    `ceil_mode` rounds up, unless the last window would start beyond the image and the padding before it.

    Raises
    ------
    ValueError
        If not even one window fits.
    """
    extent = dilation * (kernel - 1) + 1
    if ceil_mode and size > 0:
        room = size + 2 * padding - extent
        windows = -(-room // stride) + 1
        if (windows - 1) * stride >= size + padding:
            windows -= 1
        if windows >= 1:
            return windows
    return checks.window_output(size, kernel, stride, (padding, padding), dilation)


class _Pool2d(Module):
    """What the windows of both poolings have in common."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool
    _setting_checks: ClassVar = {
        "kernel_size": settings.size,
        "stride": settings.size,
        "padding": checks.pair,
        "ceil_mode": settings.flag,
    }

    def _set_window(self, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.ceil_mode = ceil_mode
        self._check_window()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self.kernel_size if name == "stride" and value is None else value)

    def _check_window(self) -> None:
        """What a window's settings must be together, whichever of them was set last."""
        if any(p > k // 2 for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"padding: {self.padding} is more than half of kernel_size {self.kernel_size}")

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, Ho, Wo) for images of (C, H, W).

        Raises
        ------
        ValueError
            If the kernel is larger than the padded image, or the padding than half of the kernel.
        """
        self._check_window()
        channels, height, width = input_shape
        top, left = (
            pool_output(size, kernel, stride, padding, dilation, self.ceil_mode)
            for size, kernel, stride, padding, dilation in zip(
                (height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return channels, top, left

    def _output(self, x: np.ndarray) -> np.ndarray:
        n, h, w, c = x.shape
        _, out_h, out_w = self.output_shape((c, h, w))
        return device_of(x).empty((n, out_h, out_w, c), x.dtype)


class MaxPool2d(_Pool2d):
    """The largest value of each window; padding is never chosen, the first of equals is, and NaN wins.

    Parameters
    ----------
    kernel_size : int or (h, w)
    stride : int or (h, w), optional
        kernel_size where it is None.
    padding : int or (h, w)
        At most half of kernel_size.
    dilation : int or (h, w)
    return_indices : bool
        Whether ``forward`` returns also each maximum's place in its image, h * W + w, as int64.
    ceil_mode : bool
        Whether a last window that reaches beyond the image counts.
    """

    _setting_checks: ClassVar = {"dilation": settings.size, "return_indices": settings.flag}

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ):
        super().__init__()
        self._set_window(kernel_size, stride, padding, ceil_mode)
        self.dilation, self.return_indices = dilation, return_indices

    def forward(self, input: np.ndarray) -> Any:
        """Pool (N, C, H, W) or (C, H, W)."""
        x = images(input)
        on, y = device_of(x), self._output(x)
        kh, kw = self.kernel_size
        argmax = on.empty(y.shape, np.min_scalar_type(kh * kw - 1))
        on.kernels.max_pool2d_forward(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            out=y,
            out_argmax=argmax,
        )
        batched = input.ndim == 4
        self._keep(argmax, x.shape, y.dtype, batched)
        if self.return_indices:
            indices = on.array(self._indices(host(argmax), x.shape[2]))
            return shown(y, batched), shown(indices, batched)
        return shown(y, batched)

    def _indices(self, argmax: np.ndarray, width: int) -> np.ndarray:
        """Offsets within windows as offsets within images."""
        kh, kw = np.divmod(argmax.astype(np.int64), self.kernel_size[1])
        _, out_h, out_w, _ = argmax.shape
        rows = np.arange(out_h)[:, None, None] * self.stride[0] - self.padding[0] + kh * self.dilation[0]
        columns = np.arange(out_w)[:, None] * self.stride[1] - self.padding[1] + kw * self.dilation[1]
        return rows * width + columns

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """The gradient of the input: that of each window goes to its maximum."""
        argmax, x_shape, dtype, batched = self._kept()
        dout = stored(dout, argmax.shape, dtype, batched)
        dx = None
        if input_grad:
            on = device_of(dout)
            dx = on.empty(x_shape, dtype)
            on.kernels.max_pool2d_backward(
                dout, argmax, x_shape, self.kernel_size, self.stride, self.padding, self.dilation, out=dx
            )
            dx = shown(dx, batched)
        self._forget()
        return dx

    def extra_repr(self) -> str:
        return (
            f"kernel_size={_short(self.kernel_size)}, stride={_short(self.stride)}, "
            f"padding={_short(self.padding)}, dilation={_short(self.dilation)}, ceil_mode={self.ceil_mode}"
        )


def _divisor(name: str, value: Any) -> int:
    """An int that can divide."""
    if (divisor := settings.whole(name, value)) == 0:
        raise ValueError(f"{name}: 0 divides nothing")
    return divisor


class AvgPool2d(_Pool2d):
    """The mean of each window.

    Parameters
    ----------
    kernel_size : int or (h, w)
    stride : int or (h, w), optional
        kernel_size where it is None.
    padding : int or (h, w)
        Zeros on each side, at most half of kernel_size.
    ceil_mode : bool
        Whether a last window that reaches beyond the image counts.
    count_include_pad : bool
        Whether the zeros of the padding count in the mean.
    divisor_override : int, optional
        Divide by this instead of the number of pixels.
    """

    _setting_checks: ClassVar = {
        "count_include_pad": settings.flag,
        "divisor_override": settings.optional(_divisor),
    }

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ):
        super().__init__()
        self._set_window(kernel_size, stride, padding, ceil_mode)
        self.count_include_pad, self.divisor_override = count_include_pad, divisor_override

    def _window(self) -> tuple:
        return (
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def forward(self, input: np.ndarray) -> np.ndarray:
        """Pool (N, C, H, W) or (C, H, W)."""
        x = images(input)
        y = self._output(x)
        device_of(x).kernels.avg_pool2d_forward(x, *self._window(), out=y)
        batched = input.ndim == 4
        self._keep(x.shape, y.shape, y.dtype, batched)
        return shown(y, batched)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """The gradient of the input: that of each window is shared out evenly."""
        x_shape, y_shape, dtype, batched = self._kept()
        dout = stored(dout, y_shape, dtype, batched)
        self._forget()
        if not input_grad:
            return None
        on = device_of(dout)
        dx = on.empty(x_shape, dtype)
        on.kernels.avg_pool2d_backward(dout, x_shape, *self._window(), out=dx)
        return shown(dx, batched)

    def extra_repr(self) -> str:
        sizes = {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding}
        return ", ".join(f"{name}={_short(size)}" for name, size in sizes.items())


def _output_sizes(name: str, value: Any) -> tuple[int | None, ...]:
    """Two sizes for one or two, any of them None."""
    sizes = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2:
        raise ValueError(f"{name}: expected an int or two, got {value!r}")
    return tuple(None if size is None else settings.count(name, size) for size in sizes)


class AdaptiveAvgPool2d(Module):
    """Means over windows that cut the image into `output_size` parts as even as can be.

    Parameters
    ----------
    output_size : int or (h, w)
        None for an axis keeps its size.
    """

    _setting_checks: ClassVar = {"output_size": _output_sizes}

    def __init__(self, output_size: Any):
        super().__init__()
        self.output_size = output_size

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, Ho, Wo) for images of (C, H, W)."""
        channels, height, width = input_shape
        out_h, out_w = self.output_size
        return channels, height if out_h is None else out_h, width if out_w is None else out_w

    def forward(self, input: np.ndarray) -> np.ndarray:
        """Pool (N, C, H, W) or (C, H, W)."""
        x = images(input)
        n, h, w, c = x.shape
        if h == 0 or w == 0:
            raise ValueError(f"input: shape {input.shape} has no pixels")
        _, out_h, out_w = self.output_shape((c, h, w))
        on = device_of(x)
        y = on.empty((n, out_h, out_w, c), x.dtype)
        if (out_h, out_w) == (1, 1):
            on.kernels.global_avg_pool2d_forward(x, out=y.reshape(n, c))
        else:
            on.kernels.adaptive_avg_pool2d_forward(x, (out_h, out_w), out=y)
        batched = input.ndim == 4
        self._keep(x.shape, y.shape, y.dtype, batched)
        return shown(y, batched)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """The gradient of the input: that of each window is shared out evenly."""
        x_shape, y_shape, dtype, batched = self._kept()
        dout = stored(dout, y_shape, dtype, batched)
        self._forget()
        if not input_grad:
            return None
        on = device_of(dout)
        dx = on.empty(x_shape, dtype)
        if y_shape[1:3] == (1, 1):
            on.kernels.global_avg_pool2d_backward(dout.reshape(y_shape[0], y_shape[3]), x_shape, out=dx)
        else:
            on.kernels.adaptive_avg_pool2d_backward(dout, x_shape, out=dx)
        return shown(dx, batched)

    def extra_repr(self) -> str:
        return f"output_size={_short(self.output_size)}"


def _short(value: tuple) -> Any:
    """One number for two equal ones."""
    return value[0] if value[0] == value[1] else value
