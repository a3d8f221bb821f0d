"""`python -m linfusion`: the same as the `linfusion` command."""

import sys

from .cli import main

sys.exit(main())
