"""Does a run cost the same at its end as at its beginning? See ``harness/bench/growth.py``."""

import sys

from harness.bench.growth import main

if __name__ == "__main__":
    sys.exit(main())
