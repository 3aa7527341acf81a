"""Blocks of tiles of Winograd's algorithm: the transforms of windows of the image, and of products."""

from __future__ import annotations

import numpy as np

from ..jit import keep_out_of_line, kernel
from . import simd
from .epilogue import Epilogue, finish_panel
from .vectors import lanes_of, pointer, prefetch
from .winograd_points import TILE
from .winograd_tiling import Tiling, panel_filters, row_origin, steps_to
from .winograd_transforms import input_columns, input_tile, output_tile
from .workspace import clear, scratch


@kernel
def transform_input(x, g, cut, first, last, c0, c1, offsets, zeros, columns, v):
    """B^T d B of the tiles from `first` to `last`, the channels from `c0` to `c1`, to `v`.

    The tiles are those that the piece `cut` of the filters sees. It is done by row of tiles and vector of
    channels, of which there is one at least. The last vector begins earlier where they don't fill it.
    """
    keep_out_of_line()
    lanes = lanes_of(x)
    side = len(g.form)
    column = side * lanes
    tile = first
    while tile < last:
        row = tile // g.tile_columns
        tw = tile - row * g.tile_columns
        many = min(g.tile_columns - tw, last - tile)
        n, top, left = row_origin(g, row)
        h0 = top - g.top + cut // g.cuts_w * g.taps * g.dilation_h
        w0 = left + tw * 4 * g.dilation_w - g.left + cut % g.cuts_w * g.taps * g.dilation_w
        window = 4 * (many - 1) + side
        before = min(max(steps_to(-w0, g.dilation_w), 0), window)
        w0 += before * g.dilation_w
        inside = max(min(steps_to(g.width - w0, g.dilation_w), window - before), 0)
        for i in range(side):
            h = h0 + i * g.dilation_h
            offsets[i] = ((n * g.height + h) * g.width + w0) * g.x_pixel if 0 <= h < g.height else -1
        clear(columns, 0, before * column)
        clear(columns, (before + inside) * column, (window - before - inside) * column)
        for begin in range(c0, c1, lanes):
            c = min(begin, c1 - lanes)
            input_columns(
                g.form, x, offsets, c, g.x_pixel * g.dilation_w, inside, zeros, columns, before * column
            )
            place = (tile - first) * g.input_tile + c - c0
            for k in range(many):
                input_tile(g.form, columns, k * 4 * column, v, place + k * g.input_tile, g.input_step)
        tile += many


@kernel
def _transform_output(m, g, first, last, bias, filter0, many, y, y0, line, pixel, height):
    """Write A^T M A + bias of `many` filters from `filter0` on, for the tiles from `first` to `last`.

    In `y` there are `pixel` elements from one pixel to the next, `line` to the next row, and `height` rows to
    the next image; `y0` is where the panel of the first image would begin.
    """
    keep_out_of_line()
    lanes = lanes_of(y)
    pixels = pointer(y)
    for tile in range(first, last):
        row = tile // g.tile_columns
        n, h, left = row_origin(g, row)
        w = left + (tile - row * g.tile_columns) * 4 * g.dilation_w
        place = y0 + (n * height + h) * line + w * pixel
        # The next tile's pixels arrive meanwhile.
        for i in range(4):
            for j in range(4, 8):
                for c in range(0, many, lanes):
                    prefetch(pixels, place + i * line * g.dilation_h + j * pixel * g.dilation_w + c)
        for c in range(0, many, lanes):
            output_tile(
                g.form,
                m,
                (tile - first) * g.panel + c,
                g.product_step,
                bias,
                filter0 + c,
                y,
                place + c,
                line * g.dilation_h,
                pixel * g.dilation_w,
                steps_to(g.out_height - h, g.dilation_h),
                steps_to(g.out_width - w, g.dilation_w),
            )


@kernel
def _pool(z, g, first, last, e, taps, y, argmax, filter0, many):
    """Finish whole rows of tiles of a panel, whose convolution lies in `z`, image by image."""
    row = first // g.tile_columns
    end = last // g.tile_columns
    z0 = 0
    while row < end:
        n = row // g.tile_rows
        h = (row - n * g.tile_rows) * 4
        rows = min((n + 1) * g.tile_rows, end) - row
        windows = min(rows * 4, g.out_height - h) // e.pool_h
        y0 = (n * e.out_h + h // e.pool_h) * e.out_w * g.y_pixel + filter0
        finish_panel(z[z0:], g.panel, windows, e, taps, y, y0, argmax, many)
        z0 += rows * 4 * g.out_width * g.panel
        row += rows


@kernel
def finish(m, g, first, last, bias, panel, y, e, taps, argmax, z):
    """Write what the products of a panel of filters make of the tiles from `first` to `last`."""
    keep_out_of_line()
    filter0, many = panel_filters(g, panel, lanes_of(y))
    filter0 += panel // g.panels * g.filters
    if e.pool_h > 0:
        line = g.out_width * g.panel
        z0 = -(first // g.tile_columns) * 4 * line
        _transform_output(m, g, first, last, bias, filter0, many, z, z0, line, g.panel, g.tile_rows * 4)
        _pool(z, g, first, last, e, taps, y, argmax, filter0, many)
    else:
        line = g.out_width * g.y_pixel
        _transform_output(m, g, first, last, bias, filter0, many, y, filter0, line, g.y_pixel, g.out_height)


def shares(use: str, parts: int, size: int) -> np.ndarray:
    """Scratch for each part."""
    return scratch(use, parts * size, np.float32).reshape(parts, size)


def products(g: Tiling, e: Epilogue, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Scratch for the products of a block with a panel, and for the rows of pixels that `e` pools."""
    rows = -(-g.block // g.tile_columns) * TILE if e.pool_h else 0
    products = shares("products", parts, g.area * g.product_step)
    return products, shares("rows", parts, max(1, rows * g.out_width * g.panel))


def windows(g: Tiling, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Scratch of `transform_input`: offsets, and columns of a row of windows."""
    side = len(g.form)
    offsets = scratch("offsets", parts * side, np.intp).reshape(parts, side)
    columns = TILE * (g.tile_columns - 1) + side
    return offsets, shares("windows", parts, columns * side * simd.lanes(np.float32))
