"""The Triton kernels of window attention in the interpreter, and what stands around them."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
