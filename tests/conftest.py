"""Eight CPU devices, one compilation cache for every worker, exact float32 products."""

import os
import tempfile
from pathlib import Path

# Compiling dominates tests of tiny models; without LLVM's expensive passes it takes a third of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest

from tests.buckets import emulators as emulators
from tests.buckets import endpoints as endpoints
from tests.buckets import store as store

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "llama_jax-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file_alone():
    """Compiled programs go with their file: of some thousands in a process XLA:CPU crashes as it writes one more."""
    yield
    jax.clear_caches()


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real inputs, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real inputs are not there: {SHARED_DATA}")
    return SHARED_DATA
