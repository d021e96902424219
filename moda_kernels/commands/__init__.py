"""The commands of `python -m moda_kernels`: a module or folder each."""
