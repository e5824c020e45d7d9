"""One setting for all tests: eight CPU devices, strict rank promotion, a compile cache between runs."""

import os
from pathlib import Path

import parity

# Read by XLA and JAX when they are imported, and inherited by the processes that tests start.
# One cache a worker of pytest-xdist, since JAX writes to it without a lock.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
_CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax" / _WORKER
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    # Tests compile much and compute little: effort of the backend is not worth its time.
    _FLAGS += " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    _FLAGS += " --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = _FLAGS.strip()

parity.find_packages()


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that the workers of pytest-xdist end together."""
    items.sort(key=lambda item: item.path.stem != "test_commands")
