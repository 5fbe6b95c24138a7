"""Which test files start first: the longest, so that none of them begins when all others are done."""

from __future__ import annotations

from pathlib import Path

# About the seconds that a file takes, where that is long; a run's table of files says them.
SECONDS = {
    "host/test_parity.py": 150,
    "host/test_off.py": 130,
    "host/test_weights.py": 120,
    "host/test_process_slots.py": 110,
    "host/test_weight_files.py": 100,
    "host/test_graphs.py": 90,
    "host/test_journal.py": 85,
    "host/test_packs.py": 80,
    "host/test_queue_packs.py": 80,
    "host/test_isolation.py": 60,
    "host/test_interrupts.py": 60,
    "host/test_saves.py": 50,
    "host/test_script_examples.py": 50,
    "host/test_model_kinds.py": 45,
    "host/test_fan_out.py": 45,
    "host/test_workers.py": 45,
    "host/test_closing.py": 45,
    "browser/test_frontend.py": 45,
    "host/test_ray.py": 40,
    "host/test_fan_out_remote.py": 25,
    "host/test_distributed_client.py": 25,
    "host/test_overwriting.py": 35,
    "host/test_http_contract.py": 35,
    "host/test_preload.py": 35,
    "host/test_stalls.py": 35,
    "browser/test_sidebar.py": 30,
    "host/test_native_writers.py": 25,
    "host/test_scheduling.py": 25,
    "browser/test_dashboard.py": 25,
    "deploy/test_fork_diff.py": 25,
    "host/test_dashboard.py": 20,
    "host/test_websockets.py": 20,
    "browser/test_states.py": 20,
    "deploy/test_nginx.py": 20,
    "host/test_broken_bodies.py": 15,
    "host/test_events.py": 15,
    "host/test_job_ends.py": 15,
    "deploy/test_caddy.py": 15,
    "deploy/test_real_start.py": 15,
}
TESTS_DIR = Path(__file__).resolve().parent


def seconds(path: Path) -> int:
    """How long a file takes, as far as it matters."""
    return SECONDS.get(path.relative_to(TESTS_DIR).as_posix(), 0)
