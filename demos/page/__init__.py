"""The page of `linfusion demo`: a queue, what its jobs do, and gradio on top (`app.py`)."""
