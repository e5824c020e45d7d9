"""Who may import whom: each module imports only what stands in a layer below its own.

Members of one package may import each other; packages of one layer may not, but for `SIBLINGS`.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm_jax"

LAYERS = {
    "types": 0,
    **dict.fromkeys(("diffusion", "nn", "parallel", "files", "settings"), 1),
    "models": 2,
    **dict.fromkeys(("data", "metrics"), 3),
    **dict.fromkeys(("evals", "training", "pages", "tasks"), 4),
    **dict.fromkeys(("runs", "planning"), 5),
    "studies": 6,
    **dict.fromkeys(
        (
            "train",
            "sample",
            "reference",
            "evaluate",
            "encode",
            "plan",
            "convert",
            "report",
        ),
        7,
    ),
}
# importer: the rooms beside or above its own that it may import
SIBLINGS = {
    "pages": {"evals", "training"},
    "planning": {"runs"},
}


def imports(path: Path, module: str) -> list[tuple[int, str]]:
    """The line and the dotted name of everything that a source file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *filter(None, [node.module])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def modules() -> list[str]:
    """Every module of the package as a dotted name; a package's `__init__` counts as its member."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


def offences(importer: str, names: list[tuple[int, str]]) -> list[str]:
    own = importer.split(".")[1]
    allowed = SIBLINGS.get(own, set()) | {own}
    result = []
    for line, name in names:
        parts = name.split(".")
        if parts[0] != "ldm_jax" or len(parts) < 2:
            continue
        target = parts[1]
        if target not in LAYERS:
            result.append(f"{importer}, line {line}: {name} has no layer")
        elif target not in allowed and LAYERS[target] >= LAYERS[own]:
            result.append(f"{importer}, line {line}: imports {name}")
    return result


@pytest.mark.parametrize("module", [m for m in modules() if m != "ldm_jax.__init__"])
def test_module_imports_only_what_lies_below(module):
    assert module.split(".")[1] in LAYERS, f"{module} has no layer"
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    assert offences(module, imports(path, module)) == []


def test_package_itself_imports_nothing_beyond_the_standard_library():
    names = {name for _, name in imports(PACKAGE / "__init__.py", "ldm_jax.__init__")}
    assert names <= sys.stdlib_module_names


def test_library_knows_no_config_file_experiment_or_test():
    outside = ("configs", "experiments", "tests", "benchmarks", "tpu")
    found = [
        (module, name)
        for module in modules()
        for _, name in imports(ROOT / Path(*module.split(".")).with_suffix(".py"), module)
        if name.split(".")[0] in outside
    ]
    assert found == []


@pytest.mark.parametrize(
    ("importer", "source", "offender"),
    [
        ("ldm_jax.nn.attention", "from ldm_jax.models import unet", "ldm_jax.models.unet"),
        (
            "ldm_jax.nn.attention",
            "from ldm_jax.diffusion import sample",
            "ldm_jax.diffusion.sample",
        ),
        ("ldm_jax.evals.evaluator", "import ldm_jax.training.state", "ldm_jax.training.state"),
        ("ldm_jax.models.unet", "def f():\n    from ..data import scenes", "ldm_jax.data.scenes"),
        ("ldm_jax.models.unet", "from ldm_jax.runs import run", "ldm_jax.runs.run"),
    ],
)
def test_an_upward_or_sideways_import_would_be_named(tmp_path, importer, source, offender):
    path = tmp_path / "module.py"
    path.write_text(source)
    (found,) = offences(importer, imports(path, importer))
    assert found.startswith(f"{importer}, line ") and found.endswith(offender)


def test_siblings_inside_a_package_and_lower_layers_pass(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import jax\nfrom ldm_jax.nn import layers\nfrom . import kl\n")
    assert offences("ldm_jax.models.unet", imports(path, "ldm_jax.models.unet")) == []


COMMANDS = [module for module in modules() if LAYERS.get(module.split(".")[1]) == 7]


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_is_flags_in_and_one_call_out(module):
    text = (ROOT / Path(*module.split(".")).with_suffix(".py")).read_text()
    assert len(text.splitlines()) <= 60
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert set(functions) <= {"main", "add_flags", "config_of"}


# What belongs together in a `Run`, by the names that such parameters had.
TOGETHER = {"config", "workdir", "mesh", "pretrained", "network"}


@pytest.mark.parametrize("module", [m for m in modules() if not m.startswith("ldm_jax.runs.")])
def test_no_function_outside_of_runs_takes_two_parts_of_a_run(module):
    text = (ROOT / Path(*module.split(".")).with_suffix(".py")).read_text()
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len(parts := TOGETHER & {argument.arg for argument in arguments}) > 1:
                found.append((node.name, sorted(parts)))
    assert found == []
