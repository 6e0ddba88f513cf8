"""`python -m rlhf_fast` is the command `rlhf-fast`."""

import sys

from rlhf_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
