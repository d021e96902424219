"""The benchmark suite: `python -m benchmarks` from a source tree (`--help` lists the options).

`layouts.py` has the sequences, `cases.py` the inputs, `peers/` one adapter per contestant, `verify.py` the oracle that
every contestant has to satisfy before it is timed, `runner.py` the timing, `memory.py` the peak memory, `results.py`
what is written down and the table.
"""
