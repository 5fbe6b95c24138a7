"""`python run_command.py …` is the command `comfy-parallel …`, from a clone and with any Python, embedded ones too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comfy_parallel.ops.cli import main

sys.exit(main())
