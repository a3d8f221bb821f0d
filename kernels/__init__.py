"""Tensor operations of the mechanisms, `[B, S, H, D]` in and out; installed as `linfusion.kernels`."""

if __name__ == "kernels":
    # The repository root is on sys.path and somebody asked for Hugging Face's `kernels`: hand them the real one,
    # or a bare version number where it is not installed (some transformers releases parse it on import).
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _elsewhere = [p for p in sys.path if not os.path.isfile(os.path.join(p or os.getcwd(), "kernels", "reference.py"))]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.origin is not None and _spec.loader is not None:
        _real = importlib.util.module_from_spec(_spec)
        sys.modules["kernels"] = _real
        _spec.loader.exec_module(_real)
    else:
        __version__ = "0"
else:
    from .agent import agent_attention, bias_factors, resize_bias
    from .agent_pool import pool_agents
    from .backend import use_backend
    from .block_sparse import block_map, block_sparse_attention
    from .depthwise import depthwise_conv
    from .linear import linear_attention
    from .pool import pool_grid
    from .prologue import qk_norm_rope
    from .rotary import RopeTables, rotate
    from .sparse_linear import sparse_linear_attention, sparse_linear_pairs
    from .window import window_attention, window_pairs

    __all__ = [
        "RopeTables",
        "agent_attention",
        "bias_factors",
        "block_map",
        "block_sparse_attention",
        "depthwise_conv",
        "linear_attention",
        "pool_agents",
        "pool_grid",
        "qk_norm_rope",
        "resize_bias",
        "rotate",
        "sparse_linear_attention",
        "sparse_linear_pairs",
        "use_backend",
        "window_attention",
        "window_pairs",
    ]
