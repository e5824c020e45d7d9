"""What importing the library costs its user: no backend, none of the trainer's engines."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINES = ("grain", "orbax", "tensorflow", "tensorflow_datasets", "clu", "array_record")
LIGHT = ("ldm_jax", "ldm_jax.diffusion", "ldm_jax.nn", "ldm_jax.models.unet", "ldm_jax.types")

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {engines!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Hidden())
"""


def run(source: str) -> str:
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", LIGHT)
def test_import_starts_no_backend_and_loads_no_engine(module):
    report = f"""
import sys, json
import {module}
backends = sys.modules.get("jax._src.xla_bridge")
print(json.dumps([sorted({{name.partition(".")[0] for name in sys.modules}}), bool(backends and backends._backends)]))
"""
    loaded, started = json.loads(run(report))
    assert set(ENGINES) & set(loaded) == set()
    assert not started


@pytest.mark.parametrize("module", LIGHT)
def test_import_works_where_the_engines_are_not_installed(module):
    run(HIDE.format(engines=ENGINES) + f"import {module}")


def test_hidden_engines_cannot_be_imported():
    with pytest.raises(AssertionError, match="No module named 'grain'"):
        run(HIDE.format(engines=ENGINES) + "import grain")


def test_ctrl_c_while_a_command_imports_is_one_line():
    command = [sys.executable, "-m", "ldm_jax.train", "--help"]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "/numpy/" not in maps.read_text():  # in the middle of the imports
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert (process.returncode, said, errors) == (130, b"", b"interrupted\n")


def test_a_program_that_imports_the_library_keeps_its_ctrl_c():
    run("import signal, ldm_jax; assert signal.getsignal(2) is signal.default_int_handler")
