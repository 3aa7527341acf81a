"""Proofs that a network's gradients are right: six tests of each layer and one report.

`check_model` runs them all on the activations that each layer really gets, `check_layer` on one layer. The
tests come from the diary of an emotion-recognition network that would not learn because its im2col ordered
the rows (i, j, n) where its convolution expected (n, i, j).
"""

from .check import check_layer, check_model
from .columns import check_adjoint, check_dx_path, check_row_order
from .differences import check_input_gradient, check_parameter_gradient, check_vector_jacobian
from .report import CheckReport, CheckRow

__all__ = [
    "CheckReport",
    "CheckRow",
    "check_adjoint",
    "check_dx_path",
    "check_input_gradient",
    "check_layer",
    "check_model",
    "check_parameter_gradient",
    "check_row_order",
    "check_vector_jacobian",
]
