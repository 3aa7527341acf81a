"""asv suites over the workloads of `benchmarks.shapes`.

asv imports this folder alone, as a package named ``suites``. The modules beside it are found through their
file, so that the checkout never stands on ``sys.path``, where it would hide the installed version under test.
"""

import importlib.util
import sys
from pathlib import Path


def _find_benchmarks() -> None:
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        "benchmarks", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


if "benchmarks" not in sys.modules:
    _find_benchmarks()
