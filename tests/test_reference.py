"""The reference's image kernels against numbers worked out by hand and the Chapter 9 notebook's prints."""

import numpy as np
import pytest

from fastcnn.kernels import reference as ref

NAN, INF = np.nan, np.inf


def image(rows, dtype=np.float64):
    """One image of one channel."""
    return np.array(rows, dtype)[None, :, :, None]


def kernel(rows):
    """One filter over one channel."""
    return np.array(rows, np.float64)[:, :, None, None]


def plane(array):
    """The only channel of the only image."""
    assert array.shape[0] == array.shape[-1] == 1
    return array[0, :, :, 0]


NINE = image([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
SIXTEEN = image(np.arange(1, 17).reshape(4, 4))


# Columns


def test_im2col_of_nine_pixels():
    expected = [[1, 2, 4, 5], [2, 3, 5, 6], [4, 5, 7, 8], [5, 6, 8, 9]]
    np.testing.assert_array_equal(ref.im2col(NINE, 2), expected)


def test_im2col_orders_rows_by_image_and_columns_by_tap():
    x = np.array([[[[1, 10], [2, 20], [3, 30]]], [[[4, 40], [5, 50], [6, 60]]]], np.float64)
    expected = [[1, 10, 2, 20], [2, 20, 3, 30], [4, 40, 5, 50], [5, 50, 6, 60]]
    np.testing.assert_array_equal(ref.im2col(x, (1, 2)), expected)


def test_im2col_with_stride_and_asymmetric_padding():
    cols = ref.im2col(NINE, 2, stride=2, padding=((1, 0), (0, 1)))
    np.testing.assert_array_equal(cols, [[0, 0, 1, 2], [0, 0, 3, 0], [4, 5, 7, 8], [6, 0, 9, 0]])


def test_im2col_with_dilation():
    np.testing.assert_array_equal(ref.im2col(NINE, 2, dilation=2), [[1, 3, 7, 9]])
    np.testing.assert_array_equal(ref.im2col(NINE, (2, 1), dilation=(2, 1)), [[1, 7], [2, 8], [3, 9]])


def test_col2im_adds_where_windows_overlap():
    dx = ref.col2im(np.ones((4, 4)), (1, 3, 3, 1), 2)
    np.testing.assert_array_equal(plane(dx), [[1, 2, 1], [2, 4, 2], [1, 2, 1]])


def test_col2im_drops_what_falls_on_padding():
    cols = np.arange(1.0, 17.0).reshape(4, 4)
    dx = ref.col2im(cols, (1, 3, 3, 1), 2, stride=2, padding=((1, 0), (0, 1)))
    np.testing.assert_array_equal(plane(dx), [[3, 4, 7], [9, 10, 13], [11, 12, 15]])


# Convolution: Chapter 9's convolve2d

CHAPTER_9_INPUT = image([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
CHAPTER_9_KERNEL = kernel([[1, 0, 1], [0, 1, 0], [1, 0, 1]])


def same_padding(size, kernel_size, stride):
    """The notebook's 'same': ceil(size / stride) outputs, the odd pixel of padding at the end."""
    total = max(0, (-(-size // stride) - 1) * stride + kernel_size - size)
    return total // 2, total - total // 2


@pytest.mark.parametrize(
    ("padding", "stride", "expected"),
    [
        ("valid", 1, [[4, 3, 4], [2, 4, 3], [2, 3, 4]]),
        (
            "same",
            1,
            [[2, 2, 3, 1, 1], [1, 4, 3, 4, 1], [1, 2, 4, 3, 3], [1, 2, 3, 4, 1], [0, 2, 2, 1, 1]],
        ),
        ("valid", 2, [[4, 4], [2, 4]]),
        ("same", 2, [[2, 3, 1], [1, 4, 3], [0, 2, 1]]),
    ],
)
def test_convolution_prints_chapter_9(padding, stride, expected):
    sides = same_padding(5, 3, stride) if padding == "same" else (0, 0)
    y = ref.conv2d_forward(CHAPTER_9_INPUT, CHAPTER_9_KERNEL, stride=stride, padding=(sides, sides))
    np.testing.assert_array_equal(plane(y), expected)


def test_same_padding_of_an_even_image_is_asymmetric():
    sides = same_padding(4, 3, 2)
    assert sides == (0, 1)
    y = ref.conv2d_forward(SIXTEEN, np.ones((3, 3, 1, 1)), stride=2, padding=(sides, sides))
    np.testing.assert_array_equal(plane(y), [[54, 45], [72, 54]])


# Convolution, by hand


def test_convolution_mixes_channels_and_adds_bias():
    x = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
    weight = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]).reshape(1, 1, 2, 3)
    y = ref.conv2d_forward(x, weight, bias=np.array([0.5, 0.0, -0.5]))
    np.testing.assert_array_equal(y[0, 0], [[5.5, 50, 499.5], [11.5, 110, 1099.5]])


def test_convolution_does_not_flip_its_kernel():
    y = ref.conv2d_forward(NINE, kernel([[1, 10], [100, 1000]]))
    np.testing.assert_array_equal(plane(y), [[5421, 6532], [8754, 9865]])


def test_convolution_with_dilation_and_unequal_strides():
    y = ref.conv2d_forward(SIXTEEN, kernel([[1, 10]]), stride=(3, 1), dilation=(1, 2))
    np.testing.assert_array_equal(plane(y), [[31, 42], [163, 174]])


def test_convolution_in_groups():
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    weight = np.arange(1.0, 9.0).reshape(1, 1, 2, 4)
    y = ref.conv2d_forward(x, weight, groups=2)
    np.testing.assert_array_equal(y.ravel(), [1 + 10, 2 + 12, 9 + 28, 12 + 32])


def test_depthwise_convolution_with_two_filters_a_channel():
    x = np.array([2.0, 3.0]).reshape(1, 1, 1, 2)
    weight = np.array([1.0, 10.0, 100.0, 1000.0]).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(ref.conv2d_forward(x, weight, groups=2).ravel(), [2, 20, 300, 3000])


def test_convolution_backward_input():
    dout, weight = image([[1, 2], [3, 4]]), kernel([[1, 10], [100, 1000]])
    dx = ref.conv2d_backward_input(dout, weight, (1, 3, 3, 1))
    np.testing.assert_array_equal(plane(dx), [[1, 12, 20], [103, 1234, 2040], [300, 3400, 4000]])


def test_convolution_backward_input_with_stride_and_padding():
    dout, weight = image([[1, 2], [3, 4]]), kernel([[1, 10], [100, 1000]])
    dx = ref.conv2d_backward_input(dout, weight, (1, 3, 3, 1), stride=2, padding=((1, 0), (1, 0)))
    np.testing.assert_array_equal(plane(dx), [[1000, 200, 2000], [30, 4, 40], [3000, 400, 4000]])


def test_convolution_backward_input_leaves_unread_pixels_zero():
    dx = ref.conv2d_backward_input(image([[5]]), kernel([[1, 2], [3, 4]]), (1, 3, 4, 1), stride=3)
    np.testing.assert_array_equal(plane(dx), [[5, 10, 0, 0], [15, 20, 0, 0], [0, 0, 0, 0]])


def test_convolution_backward_weight():
    dweight = ref.conv2d_backward_weight(image([[1, 10], [100, 1000]]), NINE, 2)
    np.testing.assert_array_equal(dweight[:, :, 0, 0], [[5421, 6532], [8754, 9865]])


def test_convolution_backward_weight_with_stride_and_padding():
    dout = image([[1, 10], [100, 1000]])
    dweight = ref.conv2d_backward_weight(dout, NINE, 2, stride=2, padding=((1, 0), (1, 0)))
    np.testing.assert_array_equal(dweight[:, :, 0, 0], [[5000, 400 + 6000], [20 + 8000, 1 + 30 + 700 + 9000]])


def test_convolution_backward_weight_in_groups():
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    dout = np.array([1.0, 10.0, 100.0, 1000.0]).reshape(1, 1, 1, 4)
    dweight = ref.conv2d_backward_weight(dout, x, 1, groups=2)
    np.testing.assert_array_equal(dweight[0, 0], [[1, 10, 300, 3000], [2, 20, 400, 4000]])


def test_bias_gradient_sums_all_axes_but_the_last():
    dout = np.arange(24.0).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(ref.conv2d_backward_bias(dout), [84, 92, 100])
    np.testing.assert_array_equal(ref.conv2d_backward_bias(np.array([[1.0, 2.0], [3.0, 4.0]])), [4, 6])


# Linear


def test_linear():
    x, weight = np.array([[1.0, 2.0]]), np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    np.testing.assert_array_equal(ref.linear_forward(x, weight), [[21, 42, 63]])
    np.testing.assert_array_equal(ref.linear_forward(x, weight, np.array([1.0, 0.0, -1.0])), [[22, 42, 62]])
    dout = np.array([[1.0, 0.0, 2.0]])
    np.testing.assert_array_equal(ref.linear_backward_input(dout, weight), [[7, 70]])
    np.testing.assert_array_equal(ref.linear_backward_weight(dout, x), [[1, 0, 2], [2, 0, 4]])


# Pooling: Chapter 9


def test_pooling_prints_chapter_9():
    y, _ = ref.max_pool2d_forward(SIXTEEN, 2, stride=1)
    np.testing.assert_array_equal(plane(y), [[6, 7, 8], [10, 11, 12], [14, 15, 16]])
    y = ref.avg_pool2d_forward(SIXTEEN, 2, stride=1)
    np.testing.assert_array_equal(plane(y), [[3.5, 4.5, 5.5], [7.5, 8.5, 9.5], [11.5, 12.5, 13.5]])


# Max pooling, by hand


def test_max_pool_and_its_argmax():
    x = image([[1, 5, 2, 0], [3, 4, 8, 1], [0, 0, 7, 7], [9, 0, 7, 7]])
    y, argmax = ref.max_pool2d_forward(x, 2)
    np.testing.assert_array_equal(plane(y), [[5, 8], [9, 7]])
    np.testing.assert_array_equal(plane(argmax), [[1, 2], [2, 0]])
    assert argmax.dtype == np.uint8
    dx = ref.max_pool2d_backward(image([[1, 2], [3, 4]]), argmax, x.shape, 2)
    np.testing.assert_array_equal(plane(dx), [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 4, 0], [3, 0, 0, 0]])


def test_max_pool_takes_the_first_of_equals_and_never_padding():
    y, argmax = ref.max_pool2d_forward(image([[-3, -3], [-3, -5]]), 2, stride=1, padding=1)
    np.testing.assert_array_equal(plane(y), [[-3, -3, -3], [-3, -3, -3], [-3, -3, -5]])
    np.testing.assert_array_equal(plane(argmax), [[3, 2, 2], [1, 0, 0], [1, 0, 0]])


def test_max_pool_of_minus_infinity_points_into_the_image():
    y, argmax = ref.max_pool2d_forward(image([[-INF, -INF]]), 2, stride=1, padding=1)
    np.testing.assert_array_equal(plane(y), np.full((2, 3), -INF))
    np.testing.assert_array_equal(plane(argmax), [[3, 2, 2], [1, 0, 0]])


@pytest.mark.parametrize(
    ("row", "expected", "offset"),
    [
        ([NAN, 1, 2], NAN, 0),
        ([1, NAN, 2], NAN, 1),
        ([NAN, INF, NAN], NAN, 2),
        ([NAN, NAN, INF], NAN, 1),
        ([-INF, NAN, 0], NAN, 1),
        ([0, INF, INF], INF, 1),
    ],
)
def test_max_pool_gives_nan_where_there_is_one(row, expected, offset):
    y, argmax = ref.max_pool2d_forward(image([row]), (1, 3))
    np.testing.assert_array_equal(y.ravel(), [expected])
    assert argmax.item() == offset


def test_max_pool_with_dilation():
    y, argmax = ref.max_pool2d_forward(SIXTEEN, 2, stride=1, dilation=2)
    np.testing.assert_array_equal(plane(y), [[11, 12], [15, 16]])
    np.testing.assert_array_equal(plane(argmax), [[3, 3], [3, 3]])
    dx = ref.max_pool2d_backward(image([[1, 2], [3, 4]]), argmax, SIXTEEN.shape, 2, stride=1, dilation=2)
    np.testing.assert_array_equal(plane(dx)[2:, 2:], [[1, 2], [3, 4]])
    assert dx.sum() == 10


def test_max_pool_in_ceil_mode():
    y, argmax = ref.max_pool2d_forward(NINE, 2, ceil_mode=True)
    np.testing.assert_array_equal(plane(y), [[5, 6], [8, 9]])
    np.testing.assert_array_equal(plane(argmax), [[3, 2], [1, 0]])
    dx = ref.max_pool2d_backward(image([[1, 2], [3, 4]]), argmax, NINE.shape, 2)
    np.testing.assert_array_equal(plane(dx), [[0, 0, 0], [0, 1, 2], [0, 3, 4]])


def test_ceil_mode_drops_a_window_that_starts_beyond_the_image():
    # Rounded up there would be three windows of stride 2 over 3 + 1 + 1 pixels; the third starts at pixel 3.
    y, _ = ref.max_pool2d_forward(NINE, (1, 2), stride=(1, 2), padding=(0, 1), ceil_mode=True)
    np.testing.assert_array_equal(plane(y), [[1, 3], [4, 6], [7, 9]])
    y, _ = ref.max_pool2d_forward(NINE, 1, stride=3, ceil_mode=True)
    np.testing.assert_array_equal(plane(y), [[1]])


def test_max_pool_backward_adds_where_windows_chose_the_same_pixel():
    x = image([[0, 0, 0], [0, 9, 0], [0, 0, 0]])
    _, argmax = ref.max_pool2d_forward(x, 2, stride=1)
    np.testing.assert_array_equal(plane(argmax), [[3, 2], [1, 0]])
    dx = ref.max_pool2d_backward(image([[1, 2], [3, 4]]), argmax, x.shape, 2, stride=1)
    np.testing.assert_array_equal(plane(dx), [[0, 0, 0], [0, 10, 0], [0, 0, 0]])


def test_argmax_has_the_smallest_dtype_that_holds_it():
    x = np.arange(17.0 * 17).reshape(1, 17, 17, 1)
    _, argmax = ref.max_pool2d_forward(x, 17)
    assert argmax.dtype == np.uint16
    assert argmax.item() == 288
    _, argmax = ref.max_pool2d_forward(x, 16)
    assert argmax.dtype == np.uint8
    assert argmax.item() == 255


def test_dilated_window_over_padding_only():
    # PyTorch gives -inf here too, with an index outside the image; the gradient must then go nowhere.
    y, argmax = ref.max_pool2d_forward(NINE, 2, padding=1, dilation=4)
    assert y.item() == -INF
    assert argmax.item() == 0
    dx = ref.max_pool2d_backward(image([[1]]), argmax, NINE.shape, 2, padding=1, dilation=4)
    np.testing.assert_array_equal(dx, np.zeros(NINE.shape))


# Average pooling, by hand


def test_average_pool_counts_padding_or_not():
    x = image([[4, 8], [12, 16]])
    y = ref.avg_pool2d_forward(x, 2, stride=2, padding=1)
    np.testing.assert_array_equal(plane(y), [[1, 2], [3, 4]])
    y = ref.avg_pool2d_forward(x, 2, stride=2, padding=1, count_include_pad=False)
    np.testing.assert_array_equal(plane(y), [[4, 8], [12, 16]])
    y = ref.avg_pool2d_forward(x, 2, stride=2, padding=1, divisor_override=2)
    np.testing.assert_array_equal(plane(y), [[2, 4], [6, 8]])


def test_average_pool_in_ceil_mode_never_counts_beyond_the_padding():
    y = ref.avg_pool2d_forward(NINE, 2, ceil_mode=True)
    np.testing.assert_array_equal(plane(y), [[3, 4.5], [7.5, 9]])
    # The second window has 6, 8, a column of padding, which counts, and a column beyond it, which does not.
    y = ref.avg_pool2d_forward(image([[1, 2, 3, 6, 8]]), (1, 4), padding=(0, 1), ceil_mode=True)
    np.testing.assert_array_equal(plane(y), [[6 / 4, 14 / 3]])


def test_average_pool_backward():
    dx = ref.avg_pool2d_backward(image([[4, 8], [12, 16]]), (1, 3, 3, 1), 2, stride=1)
    np.testing.assert_array_equal(plane(dx), [[1, 3, 2], [4, 10, 6], [3, 7, 4]])
    dx = ref.avg_pool2d_backward(
        image([[4, 8], [12, 16]]), (1, 3, 3, 1), 2, ceil_mode=True, count_include_pad=False
    )
    np.testing.assert_array_equal(plane(dx), [[1, 1, 4], [1, 1, 4], [6, 6, 16]])


def test_adaptive_average_pool_of_sizes_that_do_not_divide():
    x = image([[1, 2, 3, 4, 6]])
    np.testing.assert_array_equal(plane(ref.adaptive_avg_pool2d_forward(x, (1, 2))), [[2, 13 / 3]])
    np.testing.assert_array_equal(plane(ref.adaptive_avg_pool2d_forward(x, (1, 3))), [[1.5, 3, 5]])
    dx = ref.adaptive_avg_pool2d_backward(image([[6, 12, 24]]), (1, 1, 5, 1))
    np.testing.assert_array_equal(plane(dx), [[3, 3 + 4, 4, 4 + 12, 12]])


def test_adaptive_average_pool_enlarges():
    y = ref.adaptive_avg_pool2d_forward(image([[1, 3]]), (2, 3))
    np.testing.assert_array_equal(plane(y), [[1, 2, 3], [1, 2, 3]])


def test_global_average_pool():
    x = np.array([[[[1.0, 10.0], [3.0, 30.0]]], [[[5.0, 0.0], [6.0, 1.0]]]])
    np.testing.assert_array_equal(ref.global_avg_pool2d_forward(x), [[2, 20], [5.5, 0.5]])
    dx = ref.global_avg_pool2d_backward(np.array([[2.0, 4.0]]), (1, 1, 2, 2))
    np.testing.assert_array_equal(dx, [[[[1, 2], [1, 2]]]])
