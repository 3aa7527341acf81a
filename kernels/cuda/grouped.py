"""Convolution of many small groups, depthwise above all: too few columns for tiles, and little to multiply.

Neighbouring threads have neighbouring channels, so every access is of whole lines, and a thread has four
pixels of a row, for which it reads each weight once. With 3 x 3 taps that is eleven loads a result, most of
which the first-level cache serves: at 32 a cycle of a multiprocessor they take two thirds of the time in
which memory brings the images and takes the result.
"""

from __future__ import annotations

from numba import cuda

from ..cpu.direct import Layer
from . import checks
from . import weight_gradient as weights
from .arrays import DeviceArray
from .correlation import sizes_of
from .correlation_memory import Sizes
from .jit import THREADS, Kernel, kernel
from .splits import add_parts, multiprocessors, scratch
from .taps import advanced, digits, forward_axis, input_axis, narrow, quotient
from .vectors import LANES

# Channels of a group, in and out, up to which a tile of 32 columns would mostly hold nothing.
_MOST_CHANNELS = 8
# Pixels that make it worth to cut the sum of a weight once more.
_FEWEST_PIXELS = 64
_RESIDENT = 8


def suits(layer: Layer) -> bool:
    """Whether a layer's groups are small."""
    return layer.groups > 1 and max(layer.channels, layer.filters) <= _MOST_CHANNELS * layer.groups


def _block(channels: int) -> tuple[int, int]:
    """Threads along the channels and along the pixels."""
    across = 1
    while across < min(channels, THREADS // 2):
        across *= 2
    return across, THREADS // across


def _small_groups(transposed: bool) -> Kernel:
    """The kernel: forward, or `transposed`, which is backward to the input."""
    axis = input_axis if transposed else forward_axis

    @kernel(
        f"T[::1], T[::1], T[::1], T[::1], UniTuple(int32, {len(Sizes._fields)})",
        name="input" if transposed else "forward",
    )
    def small_groups(x, weight, bias, y, sizes):
        g = Sizes(*sizes)
        sums = cuda.local.array(LANES, x.dtype)
        phase_h = quotient(cuda.blockIdx.z, g.stride_w)
        phase_w = narrow(cuda.blockIdx.z - phase_h * g.stride_w)
        count_h, step_h, origin_h, taps_h, tap_h, first_h, every_h = axis(
            phase_h, g.out_h, g.kernel_h, g.stride_h, g.dilation_h, g.top
        )
        count_w, step_w, origin_w, taps_w, tap_w, first_w, every_w = axis(
            phase_w, g.out_w, g.kernel_w, g.stride_w, g.dilation_w, g.left
        )
        channel = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        quads = quotient(count_w + LANES - 1, LANES)
        place = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        if channel >= g.filters or place >= g.images * count_h * quads:
            return
        n, i, quad = digits(place, count_h, quads)
        j = narrow(quad * LANES)
        group = quotient(channel, g.columns)
        for lane in range(LANES):
            sums[lane] = bias[channel] if g.biased else x.dtype.type(0)
        # Weights are (kH, kW, C / groups, F): from one term to the next, and where they begin.
        step = 1 if transposed else g.filters
        begin = (channel - group * g.columns) * g.channels + group * g.depth if transposed else channel
        terms = g.columns * g.channels if transposed else g.depth * g.filters
        for th in range(taps_h):
            h = narrow(i * step_h + origin_h + th * tap_h)
            if h < 0 or h >= g.height:
                continue
            line = (n * g.height + h) * g.width
            for tw in range(taps_w):
                w = narrow(j * step_w + origin_w + tw * tap_w)
                at = ((first_h + th * every_h) * g.kernel_w + first_w + tw * every_w) * terms + begin
                for c in range(g.depth):
                    value = weight[at + c * step]
                    for lane in range(LANES):
                        column = narrow(w + lane * step_w)
                        if column >= 0 and column < g.width:
                            sums[lane] += value * x[(line + column) * g.channels + group * g.depth + c]
        apart = g.stride_w if transposed else 1
        row = n * g.out_h + (phase_h + i * g.stride_h if transposed else i)
        first = row * g.out_w + (phase_w if transposed else 0)
        for lane in range(LANES):
            if j + lane < count_w:
                y[(first + (j + lane) * apart) * g.filters + channel] = sums[lane]

    return small_groups


_KERNELS = {transposed: _small_groups(transposed) for transposed in (False, True)}


def _launch(
    layer: Layer,
    transposed: bool,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray | None,
    y: DeviceArray,
) -> None:
    sizes = sizes_of(layer, x.shape[0], transposed, bias is not None)
    phases = checks.blocks("stride", sizes.stride_h * sizes.stride_w) if transposed else 1
    height, width = sizes.out_h, sizes.out_w
    if transposed:
        height, width = -(-height // sizes.stride_h), -(-width // sizes.stride_w)
    across, down = _block(sizes.filters)
    places = sizes.images * height * -(-width // LANES)
    grid = -(-places // down), -(-sizes.filters // across), phases
    flat = y.ravel()
    start = flat if bias is None else bias
    _KERNELS[transposed][grid, (across, down)](x.ravel(), weight.ravel(), start, flat, sizes)


def forward(
    layer: Layer, x: DeviceArray, weight: DeviceArray, bias: DeviceArray | None, y: DeviceArray
) -> None:
    """Overwrite `y` with the convolution of `x`."""
    _launch(layer, False, x, weight, bias, y)


def backward_input(layer: Layer, dout: DeviceArray, weight: DeviceArray, dx: DeviceArray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    _launch(layer, True, dout, weight, None, dx)


@kernel(f"T[::1], T[::1], T[::1], int64, UniTuple(int32, {len(weights.Sizes._fields)})")
def _weights_of_small_groups(x, dout, dweight, part, sizes):
    """Four rows (kh, kw, c) of the gradient, for each filter of a block, of one part of the pixels."""
    g = weights.Sizes(*sizes)
    shared = cuda.shared.array(THREADS, x.dtype)
    sums = cuda.local.array(LANES, x.dtype)
    across, down = cuda.blockDim.x, cuda.blockDim.y
    channel = cuda.blockIdx.y * across + cuda.threadIdx.x
    group = quotient(channel, g.columns)
    row = cuda.blockIdx.z * LANES
    tap = digits(row, g.kernel_w, g.depth)
    start = cuda.blockIdx.x * g.span
    pixel = digits(start + cuda.threadIdx.y, g.out_h, g.out_w)
    step = digits(down, g.out_h, g.out_w)
    for lane in range(LANES):
        sums[lane] = 0
    if channel < g.filters:
        end = min(start + g.span, g.images * g.out_h * g.out_w)
        for k in range(start + cuda.threadIdx.y, end, down):
            gradient = dout[k * g.filters + channel]
            values = weights.fetch_scalars(x, pixel, tap, g, group * g.depth)
            for lane in range(LANES):
                sums[lane] += values[lane] * gradient
            pixel = advanced(pixel, step, g.out_h, g.out_w)
    place = cuda.threadIdx.y * across + cuda.threadIdx.x
    for lane in range(LANES):
        shared[place] = sums[lane]
        cuda.syncthreads()
        reach = down // 2
        while reach > 0:
            if cuda.threadIdx.y < reach:
                shared[place] += shared[place + reach * across]
            cuda.syncthreads()
            reach //= 2
        if cuda.threadIdx.y == 0 and channel < g.filters and row + lane < g.kernel_h * g.kernel_w * g.depth:
            at = cuda.blockIdx.x * part + (row + lane) * g.filters + channel
            dweight[at] = shared[place] + dweight[at] if g.accumulate else shared[place]
        cuda.syncthreads()


def add_weight_gradient(
    layer: Layer, dout: DeviceArray, x: DeviceArray, dweight: DeviceArray, accumulate: bool
) -> None:
    """Overwrite `dweight` with the gradient of the weights, or add it."""
    rows = layer.rows.kernel * layer.columns.kernel * (layer.channels // layer.groups)
    pixels = x.shape[0] * layer.out_image[0] * layer.out_image[1]
    across, down = _block(layer.filters)
    chunks, runs = -(-layer.filters // across), checks.blocks("kernel_size", -(-rows // LANES))
    wanted = _RESIDENT * multiprocessors() // (chunks * runs)
    parts = max(1, min(wanted, pixels // (_FEWEST_PIXELS * down)))
    span = max(1, -(-pixels // parts))
    parts = max(1, -(-pixels // span))
    sizes = weights.sizes_of(layer, x.shape[0], span, accumulate and parts == 1)
    target = dweight.ravel() if parts == 1 else scratch(parts, dweight)
    _weights_of_small_groups[(parts, chunks, runs), (across, down)](
        x.ravel(), dout.ravel(), target, dweight.size, sizes
    )
    if parts > 1:
        add_parts(dweight, target, None, accumulate)
