"""The contestants: one small adapter each. To add one, write a subclass of `Peer` and name it in `PEERS`."""

from moda_kernels.commands.bench.peers.base import Contestant, Peer, RefusedError
from moda_kernels.commands.bench.peers.eager import Eager
from moda_kernels.commands.bench.peers.flash import Flash
from moda_kernels.commands.bench.peers.flex import Flex
from moda_kernels.commands.bench.peers.moda import Moda
from moda_kernels.commands.bench.peers.sdpa import Sdpa, SdpaDense

__all__ = ["PEERS", "Contestant", "RefusedError", "Peer"]

#: By name, in the order of tables; the first that runs is what the others' times are set against.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Moda("moda-triton", "triton"),
        Moda("moda-cpu", "cpu"),
        Moda("moda-triton-build", "triton", build=True),
        Moda("moda-triton-aligned", "triton", alignment="sequence"),
        Moda("moda-triton-aligned-causal", "triton", alignment="causal"),
        Moda("moda-cpu-build", "cpu", build=True),
        Moda("moda-cpu-aligned", "cpu", alignment="sequence"),
        Moda("moda-cpu-aligned-causal", "cpu", alignment="causal"),
        Moda("moda-reference", "reference", longest=2048),
        Eager("eager-moda"),
        Eager("eager-moda-compiled", compiled=True),
        SdpaDense("sdpa-bool"),
        SdpaDense("sdpa-bool-cudnn", kernel="cudnn"),
        SdpaDense("sdpa-additive", additive=True),
        Flex("flex"),
        Flex("flex-build", build=True),
        Flex("flex-ours", ours=True),
        Flex("flex-ours-build", build=True, ours=True),
        Flex("flex-autotune", mode="max-autotune-no-cudagraphs"),
        Sdpa("sdpa"),
        Sdpa("sdpa-flash", kernel="flash"),
        Sdpa("sdpa-cudnn", kernel="cudnn"),
        Sdpa("sdpa-efficient", kernel="efficient"),
        Sdpa("sdpa-math", kernel="math"),
        Flash("flash-attention-2", "flash_attn", "flash-attn"),
        Flash("flash-attention-3", "flash_attn_interface", "flash-attn 3"),
        Flash("flash-attention-4", "flash_attn.cute", "flash-attn-4"),
    )
}
