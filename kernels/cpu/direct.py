"""Direct convolution on the register tile: forward, and backward to the input.

No im2col matrix is built. A thread copies the padded window of one block of output rows to scratch, then runs
the tile over it with offset tables (see `geometry`). The sums are those of Dumoulin & Visin, "A guide to
convolution arithmetic for deep learning" (2016), sections 2 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import geometry, simd
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .geometry import Correlation
from .pieces import clear_all
from .simd import TILE_ROWS
from .tile import overwrite_ranges
from .vectors import lanes_of
from .workspace import NOTHING, NOWHERE, clear, copy, scratch

# Multiply-adds that take about as long as moving one byte: the unit of part_count.
MULTIPLY_ADDS_PER_BYTE = 10
# Measured cycles of a product of vectors, with what the tile needs beside.
CYCLES = 1.15
# How much longer a panel of one vector takes than is reckoned: its every product loads something. Only ways
# that don't wait for loads themselves need to know.
_LONE = 1.45 if simd.FULL_WIDTH else 1.0


@kernel
def fill_window(x, n, b, h0, rows, margin, window):
    """Copy a block's input rows, from `h0` on, to `window`, with zeros where the image ends.

    Rows of the padding that are more than `margin` from the image are left as they were.
    """
    row = b.window_w * b.channels
    left = min(max(-b.origin_w, 0), b.window_w)
    first = max(b.origin_w, 0)
    copied = max(min(b.image_w - first, b.window_w - left), 0)
    begin = left * b.channels
    end = (left + copied) * b.channels
    for r in range(max(0, -margin - h0), min(rows, b.image_h + margin - h0)):
        h = h0 + r
        if h < 0 or h >= b.image_h:
            clear(window, r * row, row)
        else:
            source = ((n * b.image_h + h) * b.image_w + first) * b.channels
            clear(window, r * row, begin)
            copy(x, source, window, r * row + begin, end - begin)
            clear(window, r * row + end, row - end)


@kernel
def share(values, first, size, begin, end, times):
    """Of `size` values from `first` on, those that a cache fetches from one of equal times to another."""
    first, times = max(first, 0), max(times, 1)
    return values[first + size * begin // times : first + size * end // times]


@kernel
def read_block(x, n, first, b, skips, window):
    """Where the input of the block from grid row `first` on lies: in the image, or copied to `window`.

    Where it `skips` rows of taps that no row of the block needs, most of the padding is not even cleared.
    """
    h0 = b.origin_h + first * b.step
    if b.in_place:
        return x, ((n * b.image_h + h0) * b.image_w + b.origin_w) * b.channels
    missing = max(first + b.rows - b.height, 0)
    margin = (b.rows - 1) * b.step if skips else b.window_h
    fill_window(x, n, b, h0, b.window_h - missing * b.step, margin, window)
    return window, 0


@kernel
def following(n, first, b):
    """Where in the input the next block most often reads on."""
    return (n * b.image_h + b.origin_h + first * b.step + b.window_h) * b.image_w * b.channels


@kernel
def set_rectangle(ranges, tile, top, bottom, left, right, width):
    """Let a tile sum over a rectangle alone of what lies in rows of `width`."""
    rows, columns = max(bottom - top, 0), max(right - left, 0)
    ranges[4 * tile] = top * width + left
    ranges[4 * tile + 1] = rows * width if columns == width else columns
    ranges[4 * tile + 2] = width
    ranges[4 * tile + 3] = 1 if columns == width else rows


@kernel
def _tap_ranges(of, first, r0, r1, ranges):
    """The taps that each tile of the block from grid row `first` on needs; nothing if all need all."""
    if of.tiles.size == 0:
        return ranges[:0]
    tiles, reach, t0 = of.tiles, of.reach, r0 // TILE_ROWS
    for t in range(t0, r1 // TILE_ROWS):
        top, bottom = first + tiles[t, 0], first + tiles[t, 1]
        begin, end = min(reach[top, 0], reach[bottom, 0]), max(reach[top, 1], reach[bottom, 1])
        set_rectangle(ranges, t - t0, begin, end, tiles[t, 2], tiles[t, 3], of.blocks.line)
    return ranges


@parallel
def _correlate(
    part, parts, x, images, packed, start, y, of, columns, windows, all_ranges, e, pool, argmax, zs
):
    keep_out_of_line()
    groups, panels, depth, width = packed.shape
    weights = packed.reshape(packed.size)
    b = of.blocks
    window = windows[part]
    z = zs[part]
    image_out = y.size // images
    lanes = lanes_of(x)
    # The work is every block of every image for every panel, so that one small image keeps all threads busy.
    item, end = span(part, parts, images * b.blocks * groups * panels)
    while item < end:
        block = item // (groups * panels)
        panel0 = item - block * groups * panels
        panel1 = min(panel0 + end - item, groups * panels)
        item += panel1 - panel0
        n = block // b.blocks
        first = (block - n * b.blocks) * b.rows
        is_last = first + b.rows >= b.height
        r0, r1 = (b.tail, of.pixels.size) if is_last else (0, b.tail)
        a, a0 = read_block(x, n, first, b, of.tiles.size > 0, window)
        ranges = _tap_ranges(of, first, r0, r1, all_ranges[part])
        ahead = following(n, first, b)
        fresh = b.rows * b.step * b.image_w * b.channels
        pooled, c0 = 0, n * image_out + b.out_first + first * b.out_row
        if e.pool_h > 0:
            pooled = min(b.rows, b.height - first) // e.pool_h
            c0 = (n * e.out_h + first // e.pool_h) * e.out_w * e.filters
        for panel in range(panel0, panel1):
            g = panel // panels
            column = (panel - g * panels) * width
            many = min(columns - column, width)
            place = c0 + g * columns + column
            # In scratch whole vectors are stored, which needs no mask.
            stored = (many + lanes - 1) // lanes * lanes if e.pool_h > 0 else many
            target, t0 = (z, 0) if e.pool_h > 0 else (y, place)
            overwrite_ranges(
                a,
                a0 + g * (b.channels // groups),
                of.pixels,
                of.taps,
                r0,
                r1,
                depth,
                ranges,
                weights,
                panel * depth * width,
                width,
                start,
                panel * width,
                target,
                t0,
                of.spread,
                stored,
                share(x, ahead, fresh, panel - panel0, panel - panel0 + 1, panel1 - panel0),
            )
            finish_panel(z, width, pooled, e, pool, y, place, argmax, many)


@parallel
def _pack(part, parts, weight, positions, transposed, columns, bias, packed, start):
    """The weights by panels, and what the sums of each panel start with."""
    keep_out_of_line()
    groups, panels, depth, width = packed.shape
    filters = weight.shape[2] // groups
    inner = depth // max(positions.size, 1)
    lo, hi = span(part, parts, groups * panels)
    for task in range(lo, hi):
        g = task // panels
        p = task - g * panels
        many = min(columns - p * width, width)
        biases = many if bias.size > 0 else 0
        copy(bias, g * columns + p * width, start, task * width, biases)
        clear(start, task * width + biases, width - biases)
        for t in range(positions.size):
            for i in range(inner):
                target = packed[g, p, t * inner + i]
                if transposed:
                    source = weight[positions[t], p * width : p * width + many, g * filters + i]
                    for j in range(many):
                        target[j] = source[j]
                else:
                    copy(weight[positions[t], i], g * filters + p * width, target, 0, many)
                clear(target, many, width - many)


class Side(NamedTuple):
    """A convolution along one axis."""

    size: int
    kernel: int
    stride: int
    padding: tuple[int, int]
    dilation: int

    @property
    def outputs(self) -> int:
        """Outputs along this axis."""
        return checks.window_output(*self)

    @property
    def skips(self) -> bool:
        """Whether some inputs may meet no tap at all."""
        return self.stride > 1 and (self.stride > self.kernel or self.dilation > 1)

    def forward(self) -> geometry.Axis:
        return geometry.forward_axis(self.outputs, self.stride, self.padding[0], self.kernel, self.dilation)

    @property
    def exchanged(self) -> Side:
        """The convolution over dout whose outputs are this one's inputs; of stride 1."""
        reach = self.dilation * (self.kernel - 1)
        before, after = self.padding
        return Side(self.outputs, self.kernel, 1, (reach - before, reach - after), self.dilation)

    def phases(self) -> list[tuple[geometry.Axis, tuple[int, ...]]]:
        return geometry.input_axes(self.size, self.stride, self.padding[0], self.kernel, self.dilation)


class Layer:
    """A convolution's sizes and tables, the same for its three passes."""

    def __init__(
        self, image: tuple[int, int], channels: int, filters: int, groups: int, sides: Sequence[Side]
    ):
        self.image = image
        self.channels = channels
        self.filters = filters
        self.groups = groups
        self.rows, self.columns = sides
        self.out_image = (self.rows.outputs, self.columns.outputs)
        taps = self.rows.kernel * self.columns.kernel * (channels // groups)
        self._pooled_tables: dict[tuple[int, int, int], Correlation] = {}
        self.multiply_adds = self.out_image[0] * self.out_image[1] * filters * taps

    def forward_axes(self, e: Epilogue = NO_EPILOGUE) -> tuple[geometry.Axis, geometry.Axis]:
        """Those of the forward pass; of what `e` pools, if it does."""
        rows, columns = self.rows.forward(), self.columns.forward()
        if not e.pool_h:
            return rows, columns
        return rows._replace(outputs=e.out_h * e.pool_h), columns._replace(outputs=e.out_w * e.pool_w)

    @cached_property
    def forward_tables(self) -> Correlation:
        return geometry.correlation(
            *self.forward_axes(),
            self.image,
            self.channels,
            self.channels // self.groups,
            self.out_image[1],
            self.filters,
        )

    def pooled_tables(self, e: Epilogue, width: int) -> Correlation:
        """Tables of the forward pass for what `e` pools, into a scratch block of `width` filters."""
        key = (e.pool_h, e.pool_w, width)
        if key not in self._pooled_tables:
            self._pooled_tables[key] = geometry.correlation(
                *self.forward_axes(e),
                self.image,
                self.channels,
                self.channels // self.groups,
                e.out_w * e.pool_w,
                width,
                e.pool_h,
            )
        return self._pooled_tables[key]

    @cached_property
    def exchanged(self) -> Layer | None:
        """The layer whose x is this one's dout, and whose dout is this one's x, if there is one.

        Its weights' gradient is this one's, flipped along both sides of the kernel, with filters and channels
        exchanged.
        """
        sides = self.rows, self.columns
        if self.groups > 1 or any(side.stride > 1 or min(side.exchanged.padding) < 0 for side in sides):
            return None
        return Layer(self.out_image, self.filters, self.channels, 1, [side.exchanged for side in sides])

    @cached_property
    def positions(self) -> np.ndarray:
        """Every position in the kernel, as kh * kW + kw."""
        return np.arange(self.rows.kernel * self.columns.kernel)

    @cached_property
    def input_tables(self) -> list[tuple[Correlation, np.ndarray]]:
        """For each phase of the input: its tables over dout, and the kernel positions of its taps."""
        tables = []
        for rows, kernel_rows in self.rows.phases():
            for columns, kernel_columns in self.columns.phases():
                first = np.array(kernel_rows, np.intp) * self.columns.kernel
                table = geometry.correlation(
                    rows,
                    columns,
                    self.out_image,
                    self.filters,
                    self.filters // self.groups,
                    self.image[1],
                    self.channels,
                )
                tables.append((table, np.add.outer(first, np.array(kernel_columns, np.intp)).ravel()))
        return tables

    def forward_cycles(self, dtype: np.dtype) -> float:
        """What the forward pass of an image costs, about; of a layer that isn't grouped."""
        return CYCLES * self.multiply_adds / self.filters * -(-self.filters // simd.lanes(dtype))

    def input_cycles(self, dtype: np.dtype) -> float:
        """What the gradient to the input of an image costs, about; of a layer that isn't grouped."""
        sums = sum(of.blocks.height * of.blocks.width * of.taps.size for of, _ in self.input_tables)
        return CYCLES * sums * -(-self.channels // simd.lanes(dtype))

    def run(
        self,
        x: np.ndarray,
        table: Correlation,
        weight: np.ndarray,
        positions: np.ndarray,
        transposed: bool,
        bias: np.ndarray | None,
        y: np.ndarray,
        e: Epilogue = NO_EPILOGUE,
        argmax: np.ndarray = NOWHERE,
    ) -> None:
        """Correlate `x` with the weights at `positions`, plus `bias`, into `y`, through the epilogue `e`."""
        columns = (self.channels if transposed else self.filters) // self.groups
        packed, start = self._packed(weight, positions, transposed, columns, bias)
        b, dtype = table.blocks, x.dtype
        images = x.shape[0]
        groups, panels, _, width = packed.shape
        items = images * b.blocks * groups * panels
        parts = part_count(items, images * self.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
        size = 1 if b.in_place else b.window_h * b.window_w * b.channels
        windows = scratch("windows", (parts, size), dtype)
        zs = scratch("rows", (parts, b.rows * b.width * width if e.pool_h else 1), dtype)
        ranges = scratch("ranges", (parts, table.tiles.size), np.intp)
        _correlate(
            parts,
            x.ravel(),
            images,
            packed,
            start,
            y.ravel(),
            table,
            columns,
            windows,
            ranges,
            e,
            window_taps(e, width),
            argmax.ravel(),
            zs,
        )

    def _packed(self, weight, positions, transposed, columns, bias):
        groups, dtype = self.groups, weight.dtype
        width = simd.panel_width(dtype)
        panels = -(-columns // width)
        inner = (self.filters if transposed else self.channels) // groups
        packed = scratch("weights", (groups, panels, len(positions) * inner, width), dtype)
        start = scratch("start", groups * panels * width, dtype)
        taps = weight.reshape(weight.shape[0] * weight.shape[1], *weight.shape[2:])
        biases = NOTHING[dtype] if bias is None else bias
        parts = part_count(groups * panels, packed.nbytes)
        _pack(parts, taps, positions, int(transposed), columns, biases, packed, start)
        return packed, start


@lru_cache(maxsize=512)
def _cached_layer(
    image, channels, filters, weight_channels, groups, kernel, stride, padding, dilation
) -> Layer:
    if channels % groups or filters % groups:
        raise ValueError(
            f"groups: {groups} does not divide both the input's {channels} channels and the {filters} filters"
        )
    if weight_channels * groups != channels:
        raise ValueError(
            f"weight: {weight_channels} channels in each of {groups} groups are not the input's {channels}"
        )
    sides = [Side(*side) for side in zip(image, kernel, stride, padding, dilation, strict=True)]
    return Layer(image, channels, filters, groups, sides)


def layer(x_shape, kernel_size, weight_channels, filters, stride, padding, dilation, groups) -> Layer:
    """The layer of checked arguments; None for `weight_channels` takes those that fit."""
    given = (x_shape[1:], kernel_size, weight_channels, filters, stride, padding, dilation, groups)
    pads = padding if type(padding) is tuple else (padding,)
    if checks.are_plain(kernel_size, weight_channels or 1, filters, stride, *pads, dilation, groups):
        return _known_layer(*given)
    # Lists can't be looked up, and what is of a wrong type would be found where its equal is.
    return _checked_layer(*given)


def _checked_layer(image, kernel_size, weight_channels, filters, stride, padding, dilation, groups) -> Layer:
    groups = checks.integer("groups", groups, 1)
    height, width, channels = image
    return _cached_layer(
        (height, width),
        channels,
        filters,
        channels // groups if weight_channels is None else weight_channels,
        groups,
        checks.pair("kernel_size", kernel_size, 1),
        checks.pair("stride", stride, 1),
        checks.padding2d(padding),
        checks.pair("dilation", dilation, 1),
    )


_known_layer = lru_cache(maxsize=512)(_checked_layer)


def lone(results: int, dtype: np.dtype) -> float:
    """How much longer `Layer.run` takes for so many filters, or channels, than products in whole panels."""
    vectors = -(-results // simd.lanes(dtype))
    return (vectors - 1 + _LONE) / vectors if vectors % simd.TILE_VECTORS == 1 else 1.0


@lru_cache(maxsize=512)
def column_of_pixels(layer: Layer, images: int) -> Layer:
    """The layer on one tall image, if each output has only the input at its place: no row ends a block."""
    pixels = images * layer.image[0] * layer.image[1]
    sides = [Side(size, 1, 1, (0, 0), 1) for size in (pixels, 1)]
    if any(side._replace(size=1, dilation=1) != sides[1] for side in (layer.rows, layer.columns)):
        return layer
    return Layer((pixels, 1), layer.channels, layer.filters, layer.groups, sides)


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y`, and `argmax`, with the convolution of `x` that ends in `e`."""
    if e.pool_h:
        table = layer.pooled_tables(e, simd.panel_width(x.dtype))
        layer.run(x, table, weight, layer.positions, False, bias, y, e, argmax)
        return
    column = column_of_pixels(layer, x.shape[0])
    if column is not layer:
        layer, x = column, x.reshape(1, *column.image, column.channels)
    layer.run(x, layer.forward_tables, weight, layer.positions, False, bias, y)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    column = column_of_pixels(layer, dout.shape[0])
    if column is not layer:
        layer, dout = column, dout.reshape(1, *column.out_image, column.filters)
    if layer.rows.skips or layer.columns.skips:
        clear_all(dx)
    for table, positions in layer.input_tables:
        layer.run(dout, table, weight, positions, True, None, dx)
