"""Every op checked, then timed next to what a user would pick instead: `python -m linfusion.kernels.bench`.

One file per op says what is computed, on which shapes, and who else can (`op.Op`); `ops.py` lists them. `runner.py`
checks and times them, `table.py` keeps the rows, `plots.py` draws them.
"""
