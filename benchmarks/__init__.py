"""What belongs to the source tree of the benchmark suite (its code is `moda_kernels/commands/bench`): the results, the
README's table (`readme.py`), microbenchmarks for pytest-benchmark (`test_*.py`), native code against its twins
(`segmentation.py`), what a call costs the host before its kernel (`host_time.py`), what the compiler makes of
each kernel (`builds.py`), and all that is to be done on a GPU machine in one command (`gpu.py`)."""
