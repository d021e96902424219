"""examples/finetune_vlm.py: transformers' Trainer on one process and on two, in each of its ways. (The workflow runs it
under torchrun on up to four.)"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from ranks import Ranks

for name in ("transformers", "accelerate", "sklearn"):
    pytest.importorskip(name)
EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_vlm.py"
if not EXAMPLE.exists():
    pytest.skip("the tests stand alone, without the source tree", allow_module_level=True)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_vlm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(mode: str, steps: int) -> list[float]:
    import torch.distributed as dist

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    # What torchrun tells; the processes have found each other already.
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    return example().train(mode, steps, 1e-2)  # type: ignore[no-any-return]


def test_losses_agree(two: Ranks) -> None:
    alone = example().train("data", 3, 1e-2)
    assert len(alone) == 3 and alone[-1] < alone[0]
    for mode in ("context", "data"):
        for found in two.run(losses, mode, 3):
            assert found == pytest.approx(alone, abs=1e-3), mode
