"""Arrays in, arrays out: every operation as a NumPy reference, a Numba CPU kernel and a Numba CUDA kernel.

Import it as ``fastcnn.kernels``. ``fastcnn.kernels.reference`` is the oracle, ``fastcnn.kernels.cpu`` the
compiled twin under the same names. Nothing here keeps state or knows of layers.

Symbols, used by every docstring below: N images, C channels, H and W height and width, F filters,
(kH, kW) the kernel, (Ho, Wo) the output. Images are (N, H, W, C), filters (kH, kW, C / groups, F).
"""

if __name__ != "fastcnn.kernels":
    raise ImportError(
        f"these kernels are imported as fastcnn.kernels, not as {__name__!r}: install the project "
        "(pip install -e .) instead of putting its checkout on sys.path"
    )
