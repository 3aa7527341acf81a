"""What a check found: one row for each test, and the report that is printed from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class CheckRow:
    """The outcome of one test of one layer.

    Attributes
    ----------
    kind : str
        ``IN`` (input gradient), ``PAR`` (parameter gradient), ``ROW`` (row order of the forward pass), ``DX``
        (path of the input gradient), ``VJP`` (vector-Jacobian product) or ``ADJ`` (adjoint identity).
    name : str
        Class of the layer.
    ok : bool
        Whether the test passed.
    max_err : float
        Largest absolute difference between the two sides of the test.
    tested, skipped : int
        Numbers that were compared, and those left out because the layer has a kink there (ReLU at zero,
        equal values in a max-pool's window), where no derivative exists.
    layer : int or None
        Position of the layer in the model; None for the model as a whole.
    parameter : str or None
        Name of the parameter, for ``PAR``.
    index : int or None
        Its position among the layer's parameters.
    """

    kind: str
    name: str
    ok: bool
    max_err: float
    tested: int = 0
    skipped: int = 0
    layer: int | None = 0
    parameter: str | None = None
    index: int | None = None

    def __str__(self) -> str:
        place = "Model   " if self.layer is None else f"Layer {self.layer:02d}"
        parameter = "" if self.parameter is None else f"{self._parameter():<10} "
        text = f"[{self.kind:<3}] {place} {self.name:<21} {parameter}ok={self.ok}  max_err={self.max_err:.3e}"
        if self.skipped:
            text += f"  ({self.tested} tested, {self.skipped} skipped at kinks)"
        return text

    def _parameter(self) -> str:
        return str(self.parameter) if self.index is None else f"param[{self.index}]"


@dataclass
class CheckReport:
    """All rows of a check. ``str(report)`` is the table, ``report.ok`` the verdict."""

    rows: list[CheckRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if there is a row and every row passed."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[CheckRow]:
        """The rows that did not pass."""
        return [row for row in self.rows if not row.ok]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings and lists."""
        return {"ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def __iter__(self) -> Iterator[CheckRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))
