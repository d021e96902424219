"""The contestants: one small adapter each. To add one, write a subclass of `Peer` and name it in `PEERS`."""

from benchmarks.peers.base import Contestant, Peer
from benchmarks.peers.flex import Flex
from benchmarks.peers.moda import Moda
from benchmarks.peers.sdpa import SdpaCausal, SdpaDense, SdpaFull

__all__ = ["PEERS", "Contestant", "Peer"]

#: By name, in the order of tables; the first is what the others' times are set against.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Moda("moda-cpu", "cpu"),
        Moda("moda-cpu-aligned", "cpu", alignment="sequence"),
        Moda("moda-cpu-aligned-causal", "cpu", alignment="causal"),
        Moda("moda-reference", "reference", longest=4096),
        SdpaDense("sdpa-bool", additive=False),
        SdpaDense("sdpa-additive", additive=True),
        Flex(),
        SdpaFull(),
        SdpaCausal(),
    )
}
