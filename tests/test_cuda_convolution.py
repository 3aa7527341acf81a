"""Every tile of the convolutions' CUDA kernels, whole and in part, with the sum in one part and in several.

The parity table's calls are too small for the larger tiles to be chosen.
"""

import importlib

import cuda_device
import numpy as np
import pytest

from fastcnn.kernels import reference

cuda = cuda_device.module()
correlation, grouped, splits, weight_gradient, winograd = (
    importlib.import_module(f"fastcnn.kernels.cuda.{name}")
    for name in ("correlation", "grouped", "splits", "weight_gradient", "winograd")
)
TILES = importlib.import_module("fastcnn.kernels.cuda.tile").TILES
pytestmark = cuda_device.marks

every_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
every_split = pytest.mark.parametrize("parts", [1, 2])

# More pixels than half a tile's rows, and no multiple of anything.
IMAGE = (7, 10)
GEOMETRY = {"stride": 1, "padding": ((1, 0), (0, 1)), "dilation": 1}


def columns(tile):
    """Columns that end within a tile, mostly the second."""
    return min(tile.columns + 8, 104)


@pytest.fixture
def force(monkeypatch):
    """Have a module's launches use a tile and cut their sums into so many parts."""

    def force(module, tile, parts):
        def grid(rows, columns, products, terms, tiles, splits=True):
            slices = -(-terms // tile.depth)
            span = -(-slices // parts) * tile.depth
            count = -(-rows // tile.rows) * -(-columns // tile.columns)
            return module_grid(tile, count, -(-terms // span), span)

        module_grid = splits.Grid
        monkeypatch.setattr(module, "grid", grid)
        module._plan.cache_clear()

    yield force
    for module in (correlation, weight_gradient):
        module._plan.cache_clear()


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(actual, expected, terms):
    size = max(1.0, np.abs(expected).max())
    tolerance = 8 * np.finfo(np.float32).eps * np.sqrt(terms) * size
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


@every_split
@every_tile
def test_forward(tile, parts, force):
    force(correlation, tile, parts)
    filters = columns(tile)
    x, weight, bias = normal(0, 1, *IMAGE, 8), normal(1, 2, 2, 8, filters), normal(2, filters)
    y = cuda.conv2d_forward(*map(cuda.from_numpy, (x, weight, bias)), **GEOMETRY)
    assert_close(y, reference.conv2d_forward(x, weight, bias, **GEOMETRY), 32)


@every_split
@every_tile
def test_backward_input(tile, parts, force):
    force(correlation, tile, parts)
    shape = (1, *IMAGE, columns(tile))
    dout, weight = normal(0, 1, *IMAGE, 8), normal(1, 2, 2, shape[3], 8)
    dx = cuda.conv2d_backward_input(*map(cuda.from_numpy, (dout, weight)), shape, **GEOMETRY)
    assert_close(dx, reference.conv2d_backward_input(dout, weight, shape, **GEOMETRY), 32)


@every_split
@every_tile
def test_backward_weight(tile, parts, force):
    force(weight_gradient, tile, parts)
    filters = columns(tile)
    x, dout = normal(0, 1, 5, 4, 24), normal(1, 1, 5, 4, filters)
    dweight = cuda.conv2d_backward_weight(*map(cuda.from_numpy, (dout, x)), 2, **GEOMETRY)
    assert_close(dweight, reference.conv2d_backward_weight(dout, x, 2, **GEOMETRY), 20)


# Windows don't depend on the tile: the others are tried with the smallest.
POOLS = [(tile, (2, 2)) for tile in TILES] + [(TILES[-1], pool) for pool in ((1, 2), (4, 1), (1, 1))]


@pytest.mark.parametrize(("tile", "pool"), POOLS, ids=lambda value: getattr(value, "name", str(value)))
def test_pooled_forward(tile, pool, force):
    force(correlation, tile, 1)
    filters = columns(tile)
    x, weight, bias = normal(0, 1, *IMAGE, 8), normal(1, 2, 2, 8, filters), normal(2, filters)
    x[0, 3, 3, 0] = np.nan
    for relu in (True, False):
        y, argmax = cuda.conv2d_pool_forward(*map(cuda.from_numpy, (x, weight, bias)), pool, relu, **GEOMETRY)
        expected, where = reference.conv2d_pool_forward(x, weight, bias, pool, relu, **GEOMETRY)
        tolerance = 64 * np.finfo(np.float32).eps
        np.testing.assert_allclose(y.numpy(), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(argmax.numpy(), where)


# No kernels of the widest tile read through argmax.
@pytest.mark.parametrize("tile", TILES[1:], ids=lambda tile: tile.name)
def test_pooled_backward(tile, force):
    force(correlation, tile, 1)
    force(weight_gradient, tile, 1)
    # Eleven columns are five windows and one column that is in none.
    shape = (1, 4, 11, 8)
    x, weight = normal(0, *shape), normal(1, 2, 2, 8, columns(tile))
    y, argmax = reference.conv2d_pool_forward(x, weight, None, 2, True, **GEOMETRY)
    dout = normal(2, *y.shape)
    on_device = map(cuda.from_numpy, (dout, argmax, weight))
    dx = cuda.conv2d_pool_backward_input(*on_device, shape, 2, **GEOMETRY)
    expected = reference.conv2d_pool_backward_input(dout, argmax, weight, shape, 2, **GEOMETRY)
    assert_close(dx, expected, 4 * weight.shape[3])
    gradients = cuda.conv2d_pool_backward_weight(*map(cuda.from_numpy, (dout, argmax, x)), 2, 2, **GEOMETRY)
    expected = reference.conv2d_pool_backward_weight(dout, argmax, x, 2, 2, **GEOMETRY)
    for actual, correct in zip(gradients, expected, strict=True):
        assert_close(actual, correct, 60)


GROUPS = {
    # channels, filters, groups, kernel, stride, dilation
    "three channels, two filters": (12, 8, 4, (3, 3), 1, 1),
    "depthwise": (10, 10, 10, (3, 2), (2, 1), (1, 2)),
    "depthwise, strided": (6, 6, 6, (3, 3), (2, 3), 1),
    "two filters of each channel": (5, 10, 5, (2, 3), 1, 1),
}


@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS)
def test_small_groups(case, monkeypatch):
    channels, filters, groups, kernel, stride, dilation = case
    # Blocks don't hold all channels, and the weights' sums are cut into parts.
    monkeypatch.setattr(grouped, "_block", lambda channels: (4, 8))
    monkeypatch.setattr(grouped, "_FEWEST_PIXELS", 1)
    monkeypatch.setattr(grouped, "multiprocessors", lambda: 8)
    geometry = {"stride": stride, "padding": 1, "dilation": dilation, "groups": groups}
    x, weight = normal(0, 3, 6, 7, channels), normal(1, *kernel, channels // groups, filters)
    bias = normal(2, filters)
    y = reference.conv2d_forward(x, weight, bias, **geometry)
    dout = normal(3, *y.shape)
    arrays = {"x": x, "weight": weight, "bias": bias, "dout": dout}
    device = {name: cuda.from_numpy(array) for name, array in arrays.items()}
    assert_close(cuda.conv2d_forward(device["x"], device["weight"], device["bias"], **geometry), y, 30)
    dx = cuda.conv2d_backward_input(device["dout"], device["weight"], x.shape, **geometry)
    assert_close(dx, reference.conv2d_backward_input(dout, weight, x.shape, **geometry), 30)
    dweight = cuda.conv2d_backward_weight(device["dout"], device["x"], kernel, **geometry)
    assert_close(dweight, reference.conv2d_backward_weight(dout, x, kernel, **geometry), 126)
    pooled, argmax = cuda.conv2d_pool_forward(*(device[k] for k in ("x", "weight", "bias")), 2, **geometry)
    expected, where = reference.conv2d_pool_forward(x, weight, bias, 2, **geometry)
    assert_close(pooled, expected, 30)
    np.testing.assert_array_equal(argmax.numpy(), where)


@pytest.fixture
def only_winograd(monkeypatch):
    """Have Winograd's algorithm do what it can, however small."""
    for limit in ("_FEWEST_CHANNELS", "_FEWEST_TILES", "_FEWEST_PIXELS"):
        monkeypatch.setattr(winograd, limit, 1)


WINOGRAD = {
    # x, filters, padding: tiles that are whole and cut
    "whole tiles": ((2, 8, 4, 8), 8, 1),
    "cut tiles": ((1, 5, 7, 8), 16, ((0, 2), (2, 1))),
    "no padding": ((1, 6, 9, 16), 8, 0),
}


@pytest.mark.parametrize("case", WINOGRAD.values(), ids=WINOGRAD)
def test_winograd(case, only_winograd):
    shape, filters, padding = case
    x, weight, bias = normal(0, *shape), normal(1, 3, 3, shape[3], filters), normal(2, filters)
    geometry = {"padding": padding}
    y = reference.conv2d_forward(x, weight, bias, **geometry)
    dout = normal(3, *y.shape)
    results = [
        (cuda.conv2d_forward, reference.conv2d_forward, (x, weight, bias)),
        (cuda.conv2d_backward_input, reference.conv2d_backward_input, (dout, weight, shape)),
        (cuda.conv2d_backward_weight, reference.conv2d_backward_weight, (dout, x, 3)),
    ]
    for ours, theirs, arguments in results:
        expected = theirs(*arguments, **geometry)
        assert_within_winograd_s_bound(ours(*map(cuda_device.moved, arguments), **geometry), expected)


@pytest.mark.parametrize("pool", [1, 2])
def test_winograd_pooled(pool, only_winograd):
    shape, filters, padding = WINOGRAD["cut tiles"]
    geometry = {"pool_size": pool, "padding": padding}
    x, weight, bias = normal(0, *shape), normal(1, 3, 3, shape[3], filters), normal(2, filters)
    y, argmax = reference.conv2d_pool_forward(x, weight, bias, **geometry)
    actual, where = cuda.conv2d_pool_forward(*map(cuda.from_numpy, (x, weight, bias)), **geometry)
    assert_within_winograd_s_bound(actual, y)
    np.testing.assert_array_equal(where.numpy(), argmax)
    dout = normal(3, *y.shape)
    arguments = (dout, argmax, weight, shape)
    dx = cuda.conv2d_pool_backward_input(*map(cuda_device.moved, arguments), **geometry)
    assert_within_winograd_s_bound(dx, reference.conv2d_pool_backward_input(*arguments, **geometry))
    arguments = (dout, argmax, x, 3)
    gradients = cuda.conv2d_pool_backward_weight(*map(cuda_device.moved, arguments), **geometry)
    expected = reference.conv2d_pool_backward_weight(*arguments, **geometry)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_within_winograd_s_bound(ours, theirs)


def assert_within_winograd_s_bound(actual, expected):
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_winograd_is_used_for_wide_layers_only():
    def suits(channels, images=32, dtype=np.float32, kernel=3, stride=1):
        side = (images, 16, 16, channels)
        layer = winograd.direct.layer(side, (kernel, kernel), channels, 128, stride, kernel // 2, 1, 1)
        return winograd.suits(layer, images, np.dtype(dtype))

    assert suits(64)
    assert suits(128)
    assert not suits(32)
    assert not suits(68)
    assert not suits(64, images=1)
    assert not suits(64, dtype=np.float64)
    assert not suits(64, kernel=5)
    assert not suits(64, stride=2)


def test_a_tile_is_chosen_that_fills_the_device(monkeypatch):
    monkeypatch.setattr(splits, "multiprocessors", lambda: 132)
    large = splits.grid(rows=100_000, columns=128, products=1, terms=1152)
    assert (large.tile.name, large.parts) == ("128x128", 1)
    assert splits.grid(100_000, 64, 1, 576).tile.name == "128x64"
    assert splits.grid(100_000, 32, 1, 288).tile.name == "128x32"
    weights = splits.grid(rows=1152, columns=128, products=1, terms=100_000)
    assert weights.tile.name == "128x128"
    assert 132 <= weights.tiles * weights.parts <= 2 * 132
    assert splits.grid(1152, 128, 1, 100_000, splits=False).tile.name == "32x32"
    nothing = splits.grid(rows=9, columns=4, products=1, terms=0)
    assert (nothing.parts, nothing.span > 0) == (1, True)
    small = splits.grid(rows=512, columns=128, products=1, terms=1152)
    assert small.tile.name == "32x32"
    assert 132 <= small.tiles * small.parts <= 16 * 132
    assert small.parts * small.span >= 1152 > (small.parts - 1) * small.span


def test_arrays_that_are_not_aligned_are_read_by_scalars():
    x, weight = normal(0, 1, 3, 4, 8), normal(1, 2, 2, 8, 4)
    memory = cuda.from_numpy(np.concatenate([np.zeros(1, np.float32), x.reshape(-1)]))
    y = cuda.conv2d_forward(memory[1:].reshape(x.shape), cuda.from_numpy(weight))
    assert_close(y, reference.conv2d_forward(x, weight), 32)


def test_more_pixels_than_kernels_count_are_refused():
    layer = winograd.direct.layer((1, 2, 2, 1), (1, 1), 1, 1, 1, 0, 1, 1)
    for name, sizes in (
        ("x", lambda: correlation.sizes_of(layer, 2**29, False, False)),
        ("dout", lambda: correlation.sizes_of(layer, 2**29, True, False)),
        ("x", lambda: weight_gradient.sizes_of(layer, 2**29, 8, False)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: 2147483648 pixels"):
            sizes()


def test_more_blocks_than_a_device_has_are_refused():
    dout, weight = cuda.zeros((1, 1, 1, 16)), cuda.zeros((1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"^stride, groups: makes 66000 blocks"):
        cuda.conv2d_backward_input(dout, weight, (1, 1, 1, 16), stride=(300, 220))
    depthwise = cuda.zeros((1, 1, 1, 16))
    with pytest.raises(ValueError, match=r"^stride: makes 66000 blocks"):
        cuda.conv2d_backward_input(dout, depthwise, (1, 1, 1, 16), stride=(300, 220), groups=16)
    dx = cuda.conv2d_backward_input(dout, weight, (1, 1, 1, 16), stride=(3, 220))
    assert not dx.numpy().any()


@pytest.mark.parametrize("channels", [3, 40])
def test_sums_of_many_rows_are_parts_of_blocks(channels):
    dout = normal(0, 300, channels)
    dbias = cuda.conv2d_backward_bias(cuda.from_numpy(dout))
    assert_close(dbias, reference.conv2d_backward_bias(dout), 300)
    cuda.conv2d_backward_bias(cuda.from_numpy(dout), out=dbias, accumulate=True)
    assert_close(dbias, 2 * reference.conv2d_backward_bias(dout), 300)
