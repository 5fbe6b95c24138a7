"""`python -m comfy_parallel` is the command `comfy-parallel`."""

import sys

from comfy_parallel.ops.cli import main

sys.exit(main())
