"""The compiled module (`csrc/bindings.cpp`): addresses in, nothing out. Only `native.py` uses it."""

INTERFACE: int
WITH_CUDA: bool
CUDA_ARCHITECTURES: str
CUDA_RUNTIME: int
MAX_ROLES: int
PASSES_AT_ONCE: int
NO_WINDOW: int

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
def token_facts(
    *,
    tokens: int,
    roles: int,
    modality: int,
    role: int,
    sequence: int,
    steps: int,
    chunks: int,
    step: int,
    chunk: int,
    falls: int,
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
def mask_intervals_workspace(tokens: int, slots: int) -> int: ...
def mask_intervals(
    *,
    device: int,
    stream: int,
    workspace: int,
    tokens: int,
    rows: int,
    sequences: int,
    roles: int,
    max_segments: int,
    facts: list[int],
    cu_seqlens: int,
    table: int,
    columns: int,
    rules: list[int],
    modalities: list[int],
    own: list[int],
    intervals: int,
    window: int,
    window_all: bool,
    limits: int,
    positions: int,
) -> None: ...

# cu_seqlens; length of each sequence or -1, block, tiles
_Cut = tuple[int, int, int, int]

def walk_workspace(passes: int, walks: int, query_tiles: int, key_tiles: int, of_keys: bool) -> int: ...
def query_walk(
    *,
    device: int,
    stream: int,
    workspace: int,
    passes: int,
    intervals: int,
    sequences: int,
    rows: int,
    tokens: int,
    limits: int,
    positions: int,
    real: int,
    queries: _Cut,
    keys: _Cut,
    affine: bool,
    tiles: int,
    order: int,
    runs: int,
    key_lists: int,
) -> None: ...
def key_walk(
    *,
    device: int,
    stream: int,
    workspace: int,
    passes: int,
    intervals: int,
    sequences: int,
    rows: int,
    tokens: int,
    limits: int,
    positions: int,
    queries: _Cut,
    keys: _Cut,
    chains: int,
    tiles: int,
    order: int,
    runs: int,
    query_lists: int,
) -> None: ...

CALL_FIELDS: int

# tokens, queries, sequences; passes, first, last, intervals; addresses; costs
_Plan = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]

def plan_attention(arguments: _Plan) -> tuple[bytearray, bytearray]: ...
def plan_masks(arguments: _Plan, calls: int, plan: int, indices: int, masks: int, hidden: int) -> None: ...
