"""The attention kernels in Triton. They know pointers and sizes, nothing of layouts, masks or autograd."""
