"""The demo as a Space, or anywhere: `python app.py` in this folder, with nothing installed but requirements.txt.

Set LINFUSION_MODEL to a folder or Hub id for another model, and GRADIO_SERVER_NAME and GRADIO_SERVER_PORT as usual.
"""

import os
import sys

from linfusion.cli import main

if __name__ == "__main__":
    sys.exit(
        main(
            [
                "demo",
                *("--model", os.environ.get("LINFUSION_MODEL", "emoji-flux")),
                *("--host", os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")),
                *("--port", os.environ.get("GRADIO_SERVER_PORT", "7860")),
            ]
        )
    )
