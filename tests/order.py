"""Which test files start first: the longest, so that none of them begins when all others are done."""

from __future__ import annotations

from pathlib import Path

# Seconds that a file takes with its hosts, where that is long.
SECONDS = {
    "host/test_weight_files.py": 60,
    "host/test_process_slots.py": 60,
    "host/test_off.py": 60,
    "host/test_packs.py": 60,
    "host/test_openapi.py": 60,
    "host/test_journal.py": 60,
    "host/test_isolation.py": 60,
    "host/test_parity.py": 60,
    "host/test_weights.py": 40,
    "host/test_queue_packs.py": 40,
    "host/test_graphs.py": 40,
    "browser/test_frontend.py": 40,
    "host/test_workers.py": 40,
    "host/test_stalls.py": 30,
    "host/test_dashboard.py": 30,
    "host/test_scheduling.py": 30,
    "host/test_closing.py": 30,
    "browser/test_dashboard.py": 20,
    "browser/test_sidebar.py": 20,
    "deploy/test_fork_diff.py": 20,
    "deploy/test_caddy.py": 15,
}
TESTS_DIR = Path(__file__).resolve().parent


def seconds(path: Path) -> int:
    """How long a file takes, as far as it matters."""
    return SECONDS.get(path.relative_to(TESTS_DIR).as_posix(), 0)
