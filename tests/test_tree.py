"""Properties of the source tree that readers rely on, checked on its syntax alone where that is enough."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("wlra", "bert_adapter")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TREES = {path.relative_to(ROOT): ast.parse(path.read_text("utf-8")) for path in FILES}
SCRIPTS = {
    path.relative_to(ROOT): ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "benchmarks").glob("*.py"))
}
STANDARD = sys.stdlib_module_names | {"annotationlib", "compression"}  # the latter since Python 3.14
ENTRY_POINTS = {"solve", "solve_batch", "compress"}  # what users call may have more options
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """wlra/linalg/gram.py is wlra.linalg.gram, and wlra/linalg/__init__.py is wlra.linalg."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): tree for path, tree in TREES.items()}


def functions(trees: dict[Path, ast.Module] = TREES) -> Iterator[tuple[str, Function]]:
    """Every function of these files, by default of both packages, with its place."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def none(faults: list[str]) -> None:
    """Fails with the list of faults, a line each."""
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.mark.parametrize(
    "package", [name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)]
)
def test_no_name_of_a_package_hides_its_module(package: str) -> None:
    """`import wlra.path` and `wlra.path` must be the same thing, whatever else was imported."""
    submodules = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
    for name in submodules:
        if name not in ("sklearn", "modeling_low_rank"):  # they need scikit-learn and PyTorch
            importlib.import_module(f"{package}.{name}")
    namespace = vars(importlib.import_module(package))
    found = {name: getattr(namespace.get(name), "__name__", f"{package}.{name}") for name in submodules}
    none(
        [f"{package}.{name} is not the module {package}.{name}" for name in found if found[name] != f"{package}.{name}"]
    )


def test_no_module_has_the_name_of_a_standard_one() -> None:
    """Else the standard one is hidden when a file of the same folder is run as a script."""
    none([f"{path} hides the standard module {path.stem}" for path in TREES if path.stem in STANDARD])


def test_signatures_have_at_most_twelve_parameters() -> None:
    def parameters(node: Function) -> int:
        return len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)

    long = [(place, parameters(node)) for place, node in functions() if node.name not in ENTRY_POINTS]
    none([f"{place}: {count} parameters" for place, count in long if count > 12])


def test_bodies_have_at_most_forty_lines() -> None:
    def lines(node: Function) -> int:
        body = node.body[1:] if ast.get_docstring(node) else node.body
        return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]

    none([f"{place}: {lines(node)} lines" for place, node in functions(TREES | SCRIPTS) if lines(node) > 40])


def test_no_call_has_more_than_four_positional_arguments() -> None:
    """Where many values go by position, two of one type can be swapped and nobody notices."""
    faults = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and sum(not isinstance(arg, ast.Starred) for arg in node.args) > 4:
                faults.append(f"{path}:{node.lineno} {ast.unparse(node.func)}: {len(node.args)} by position")
    none(faults)


def imports(name: str, tree: ast.Module) -> set[str]:
    """The modules of both packages that a module imports when it is imported itself."""
    found = set()
    for node in tree.body:  # not what functions import when they are called
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {module for module in found if module in MODULES} - {name}


def test_imports_have_no_cycles() -> None:
    edges = {name: imports(name, tree) for name, tree in MODULES.items()}
    done: set[str] = set()
    faults: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            faults.append(" -> ".join((*way[way.index(name) :], name)))
        elif name not in done:
            for other in sorted(edges[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
    none(faults)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    shown = {name: thing for name, thing in public.items() if callable(thing)}
    none(
        [
            f"{package}.{name}: no Example in its docstring"
            for name in shown
            if "Example" not in (shown[name].__doc__ or "")
        ]
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_shipped(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_the_command_line_runs_as_a_script() -> None:
    """Its folder comes first among the places that modules are looked for."""
    command = [sys.executable, str(ROOT / "bert_adapter" / "cli.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bert-adapter compress" in done.stdout
