"""FlexAttention as tests want it: uncompiled, in any float dtype, with gradients wherever tensors are."""

import contextlib
from collections.abc import Iterator

from moda_kernels.backends.flex import engine


@contextlib.contextmanager
def eager_flex() -> Iterator[None]:
    """Within the block the backend "flex" runs FlexAttention uncompiled: the same masks and scores, in L×L memory, with
    gradients on the CPU too (which its public function refuses there, before any arithmetic).

    Raises:
        NotImplementedError: this torch's operator is another than the one that is called here.
    """
    reason = engine.why_not_uncompiled()
    if reason is not None:
        raise NotImplementedError(reason)
    with engine.uncompiled():
        yield
