"""Models optimized for an NVIDIA GPU: blocks of a few fused kernels in bfloat16 or float16."""
