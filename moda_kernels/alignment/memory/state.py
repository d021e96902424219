"""`DecodeState`, what lives beside a KV cache: the tokens so far (`history.py`) and a memory for each layer."""

from torch import Tensor

from moda_kernels.alignment.memory.history import History
from moda_kernels.alignment.memory.layer import LayerState
from moda_kernels.runtime import checks
from moda_kernels.tokens.layout import ModalityLayout


class DecodeState:
    """Lives beside the KV cache of a model while it generates; with it each new token costs one token's alignment.

    One state serves all layers: the tokens are said once per step (:meth:`append`), and ``state[i]`` is what layer i
    remembers. The cache holds raw keys (after the rotary embedding). Each attention call gives what one full pass over
    the raw keys so far gives for the newest tokens, whatever the options. ::

        state = mk.DecodeState(num_modalities=2)
        for ids in (prompt_ids, next_ids, next_ids):  # integer [B, n]: modalities of the new tokens, -1 = padding
            state.append(ids)
            for i, layer in enumerate(layers):
                q, k, v = layer.project(x)  # of the new tokens
                keys, values = cache.update(k, v, i)  # raw
                key_map = layer.aligner(keys, state=state[i])  # reads the new keys only
                x = x + mk.moda_attention(q, keys, values, state=state, key_map=key_map, is_causal=True)

    How many keys the cache gives decides how they are read, call by call:

    - as many as tokens so far: a cache that grows;
    - more: a static cache, filled from the left (what lies behind the newest token is not looked at);
    - fewer: a sliding-window cache, which holds the last ones. A mask that shows a query keys that are gone raises.

    Packed layouts (``cu_seqlens``) have the new tokens at the end of each document, so keys and values are to be put
    there, too.

    Answers to one prompt that are decoded at the same time take a row each.

    Args:
        num_modalities: M.
        num_roles: R, where tokens have roles of their own. Default: M.
        undo: so many of the last tokens :meth:`crop` takes back without reading all keys again, by up to two older
            copies of the Gram sums (M·Hkv·D² numbers each, per sequence and layer). Has to be less than the window of a
            sliding cache. Not for packed documents.

    Attributes:
        length: tokens so far, padding included: columns of the batch, or all tokens of packed documents.

    A state belongs to one set of weights: make a new one for each prompt, and after each optimiser step.
    """

    def __init__(self, num_modalities: int, *, num_roles: int | None = None, undo: int = 32) -> None:
        checks.integer("num_modalities", num_modalities, 1)
        roles = num_modalities if num_roles is None else checks.integer("num_roles", num_roles, 1)
        self.history = History(num_modalities, roles, checks.integer("undo", undo, 0))
        self._layers: dict[int, LayerState] = {}

    @property
    def num_modalities(self) -> int:
        return self.history.num_modalities

    @property
    def num_roles(self) -> int:
        return self.history.num_roles

    @property
    def undo(self) -> int:
        return self.history.undo

    @property
    def length(self) -> int:
        return self.history.length

    @property
    def packed(self) -> bool:
        return self.history.packed

    def __getitem__(self, layer: int) -> LayerState:
        """What layer `layer` remembers; made at the first call."""
        checks.integer("layer", layer, 0)
        return self._layers.setdefault(layer, LayerState(self.history))

    def append(
        self,
        modality_ids: Tensor,
        *,
        item_ids: Tensor | None = None,
        roles: Tensor | None = None,
        steps: Tensor | None = None,
        chunks: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> ModalityLayout:
        """Say what the new tokens are: once per step, before the layers run.

        Args:
            modality_ids: integer ``[B, n]``, or ``[n]`` with ``cu_seqlens``: 0…M-1, or -1 for padding, which is also
                what a sequence without a new token gets.
            item_ids, roles, steps, chunks: as in :func:`segment_modalities`. Where they are left out, items and steps
                are 0, roles are the modalities, and tokens are in no chunk. A chunk goes on where the last token before
                had the same number.
            cu_seqlens: packed documents: integer ``[N + 1]``, which new tokens are of which document.

        Returns:
            The layout of all tokens so far.

        Raises:
            ValueError, TypeError: as :func:`segment_modalities`; another batch size, number of documents or device than
                before. The state is then as it was.
        """
        return self.history.append(modality_ids, cu_seqlens, item_ids=item_ids, roles=roles, steps=steps, chunks=chunks)

    def layout(self, columns: int | None = None) -> ModalityLayout:
        """The layout of the keys that a cache of so many columns holds.

        Args:
            columns: default: as many as tokens. More: padding behind them; fewer: the last ones (counts are those of
                all tokens, so that pseudo-attention knows the sequence's length). Packed: only the default.

        Raises:
            ValueError: nothing appended yet; another number of columns with packed documents.
        """
        return self.history.layout(columns)

    def reorder(self, beam_idx: Tensor) -> None:
        """Sequences (or documents) in another order, some of them several times or not at all, as a cache does for
        beams.

        Args:
            beam_idx: integer ``[new N]``, which sequence each new one continues.
        """
        moved = self.history.reorder(beam_idx)
        if moved is not None:
            for layer in self._layers.values():
                layer.reorder(moved)

    def crop(self, length: int | Tensor) -> None:
        """Forget all tokens but the first ``length``, as a cache does for rejected ones.

        Aligned keys of the others stay; Gram sums go back to an older copy (see ``undo``) or to nothing, and are made
        again from there with the cache's keys at the next call, which raises if the cache no longer has them. Nothing
        is subtracted.

        Args:
            length: columns that stay; packed: tokens of each document, also an integer tensor ``[N]``. More than there
                are: nothing happens.
        """
        if self.history.crop(length):
            for layer in self._layers.values():
                layer.crop()


def layer_of(state: DecodeState | LayerState) -> LayerState:
    """``state[i]`` as it is; of a whole state, that of its only layer, 0."""
    if isinstance(state, LayerState):
        return state
    if not isinstance(state, DecodeState):
        raise checks.wrong_type("state", "a DecodeState, or state[i] of one", state)
    return state[0]
