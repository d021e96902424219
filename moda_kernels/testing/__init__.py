"""For tests, benchmarks and `verify`: cases of attention, the oracle and the error criterion.

`cases.py` makes inputs; `oracle.py` runs and judges them. `random_calls.py` draws calls of every option at once,
`fuzz.py` judges them; `dense.py` is a second oracle.
"""

from moda_kernels.testing.cases import (
    CASES,
    PADDING,
    Case,
    Inputs,
    Result,
    generator,
    random_ids,
    random_layout,
    random_mask,
    random_steps,
)
from moda_kernels.testing.flex import eager_flex
from moda_kernels.testing.oracle import (
    Comparison,
    check,
    compare,
    eager,
    head_orders,
    judge,
    oracle,
    poisoned_memory,
    reordered,
    run,
    sdpa_errors,
)

__all__ = [
    "CASES", "PADDING", "Case", "Comparison", "Inputs", "Result", "check", "compare", "eager", "eager_flex",
    "generator", "head_orders", "judge", "oracle", "poisoned_memory", "random_ids", "random_layout", "random_mask",
    "random_steps", "reordered", "run", "sdpa_errors",
]  # fmt: skip
