"""`python -m linfusion.kernels.bench`: the same as `linfusion bench`."""

import argparse
import sys

from .command import DESCRIPTION, add_options, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m linfusion.kernels.bench", description=DESCRIPTION, allow_abbrev=False
    )
    add_options(parser)
    try:
        return run(parser.parse_args())
    except (ValueError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
