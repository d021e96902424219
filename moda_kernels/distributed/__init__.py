"""Beyond one GPU, on torch.distributed alone: context parallelism, sequence parallelism by heads (Ulysses), plans.

`plan.py` decides who holds which columns and who needs them, `context.py` is `ContextParallel`, `maps.py` its duplex
alignment, `route.py` how keys travel, `shards.py` parts of layouts, `ulysses.py` the all-to-all of heads, `groups.py`
what groups may be given. Tensor parallelism needs nothing of this: DTensors go through `moda_attention` as they are.
"""

from moda_kernels.distributed.context import ContextParallel
from moda_kernels.distributed.plan import Plan, plan_shards
from moda_kernels.distributed.ulysses import ulysses_attention

__all__ = ["ContextParallel", "Plan", "plan_shards", "ulysses_attention"]
