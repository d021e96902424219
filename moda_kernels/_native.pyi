"""The compiled module (`csrc/bindings.cpp`): addresses in, nothing out. Only `native.py` uses it."""

WITH_CUDA: bool
CUDA_ARCHITECTURES: str
CUDA_RUNTIME: int
MAX_MODALITIES: int
MAX_LISTED_TOKENS: int
NO_WINDOW: int

# cu_seqlens, rows, lists and counts; block, tiles, width
_Side = tuple[int, int, int, int, int, int, int]

def cuda_probe(device: int) -> str: ...
def segment_tokens_workspace(tokens: int, modalities: int) -> int: ...
def segment_tokens(
    *,
    device: int,
    stream: int,
    workspace: int,
    tokens: int,
    sequences: int,
    modalities: int,
    modality: int,
    items: int,
    cu_seqlens: int,
    segment: int,
    position: int,
    sequence: int,
    prefix: int,
    num_segments: int,
) -> None: ...
def segment_table(
    *,
    device: int,
    stream: int,
    tokens: int,
    max_segments: int,
    modality: int,
    segment: int,
    sequence: int,
    table: int,
) -> None: ...
def tile_lists_workspace(sequences: int, modalities: int, query_tiles: int, key_tiles: int) -> int: ...
def tile_lists(
    *,
    device: int,
    stream: int,
    workspace: int,
    sequences: int,
    modalities: int,
    modality: int,
    segment: int,
    position: int,
    first_column: int,
    rules: list[int],
    window: int,
    queries: _Side,
    keys: _Side,
    overflow: int,
) -> None: ...
