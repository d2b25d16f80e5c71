"""`arpo-trl merge ADAPTER OUTPUT` under its earlier name."""

import sys

from arpo_trl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
