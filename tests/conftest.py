"""One setting for all tests: eight CPU devices, strict rank promotion, a compile cache between runs."""

import os
from pathlib import Path

import parity
import pytest

TESTS = Path(__file__).parent
# What takes longest comes first, so that the workers of pytest-xdist end together.
LONGEST = ("test_processes", "test_drills", "test_commands")

# Read by XLA and JAX when they are imported, and inherited by the processes that tests start.
_CACHE = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", TESTS.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    # Tests compile much and compute little: effort of the backend is not worth its time.
    _FLAGS += " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    _FLAGS += " --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = _FLAGS.strip()

parity.find_packages()


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module", autouse=True)
def compile_cache(request):
    """A directory for each file of tests, which one worker runs: JAX writes to it without a lock.

    Another Python finds there what the first has compiled.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    directory = str(_CACHE / request.path.relative_to(TESTS).with_suffix(""))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    compilation_cache.set_cache_dir(directory)
