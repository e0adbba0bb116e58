"""The rules of the repository's layout: which folder may import which, and what the core costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("kernels", "runtime", "export", "bench")  # each may import itself and what is left of it
SOURCES = sorted(path for root in ORDER for path in (ROOT / root).rglob("*.py"))
LIGHT = ("numpy", "PIL", "tqdm")
"""All that importing the core may load beside the standard library, and what these load."""


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module that the file may import, as (line, absolute dotted name).

    `path` is relative to the repository's root. Names that `from package import name` takes may be
    modules or not; they are counted as if they were.
    """
    package = ("fluxkontext", *path.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and path.parts[:2] != ("runtime", "commands"):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in {"import_module", "__import__", "find_spec"}:
                for name in node.args[:1]:
                    if isinstance(name, ast.Constant) and isinstance(name.value, str):
                        level = len(name.value) - len(name.value.lstrip("."))
                        base = package[: len(package) - level + 1] if level else ()
                        yield node.lineno, ".".join((*base, name.value[level:]))


def violations(path: Path, source: str) -> list[str]:
    allowed = ORDER[: ORDER.index(path.parts[0]) + 1]
    found = []
    for line, name in imports(path, ast.parse(source)):
        top, _, rest = name.partition(".")
        if top in (*ORDER, "tests"):
            found.append(f"{path}:{line} imports {name}: {top} is reached as fluxkontext.{top}")
        elif top == "fluxkontext" and rest.partition(".")[0] not in allowed:
            found.append(f"{path}:{line} imports {name}: {path.parts[0]} may use {allowed}")
    return found


def test_imports_point_one_way() -> None:
    found = [
        line
        for path in SOURCES
        for line in violations(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("kernels/a.py", "from ..runtime import x", True),
        ("kernels/a.py", "from .. import runtime", True),
        ("kernels/a.py", "import fluxkontext.bench.x", True),
        ("kernels/a.py", "def f():\n    from fluxkontext import export", True),
        ("runtime/backends/a.py", "from ...export.x import y", True),
        ("runtime/backends/a.py", "from ...kernels import y\nfrom ..x import z", False),
        ("runtime/a.py", "import kernels", True),
        ("runtime/a.py", "importlib.import_module('fluxkontext.bench.x')", True),
        ("runtime/a.py", "import_module('..export', __package__)", True),
        ("runtime/a.py", "import_module('.backends', __package__)", False),
        ("runtime/commands/a.py", "import_module('fluxkontext.bench.x')", False),
        ("runtime/commands/a.py", "from ...bench import x", True),
        ("bench/a.py", "from ..runtime import x\nfrom ..export import y\nimport torch", False),
        ("bench/a.py", "from fluxkontext.tests import x", True),
    ],
)
def test_the_import_rule_itself(path: str, source: str, bad: bool) -> None:
    assert bool(violations(Path(path), source)) is bad


def run_python(code: str, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_core_imports_nothing_heavy(namespace_env: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys, numpy, PIL.Image, tqdm; before = set(sys.modules);"
        "import fluxkontext.runtime as it; fresh = sys.modules.keys() - before;"
        "packages = {name.partition('.')[0] for name in fresh} - sys.stdlib_module_names;"
        "print(it.__file__, *sorted(packages))"
    )
    file, *loaded = run_python(code, namespace_env, tmp_path).split()
    assert Path(file).resolve() == ROOT / "runtime" / "__init__.py"
    assert set(loaded) <= {"fluxkontext", *LIGHT}


def test_core_imports_quickly(namespace_env: dict[str, str], tmp_path: Path) -> None:
    """At most four times what its two largest dependencies cost. In processor time, the least of
    several runs in turns: other work on the machine only adds to it, and so does writing bytecode.
    """
    code = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
    seconds: dict[str, list[float]] = {"numpy, PIL.Image": [], "fluxkontext.runtime": []}
    for _ in range(6):
        for modules, taken in seconds.items():
            taken.append(float(run_python(code.format(modules), namespace_env, tmp_path)))
    baseline, ours = (min(taken) for taken in seconds.values())
    assert ours <= 4 * baseline, f"{ours:.3f} s against {baseline:.3f} s for numpy and Pillow"


@pytest.mark.parametrize("root", ORDER)
def test_every_package_is_typed_and_found(root: str) -> None:
    """A folder without `__init__.py` works from a checkout and is missing from the wheel."""
    assert (ROOT / root / "py.typed").is_file()
    folders = {path.parent for path in SOURCES if path.is_relative_to(ROOT / root)}
    assert not [str(path) for path in sorted(folders) if not (path / "__init__.py").is_file()]


def test_namespace_has_no_root_package() -> None:
    """Nor may tests be one: `tests/kernels/__init__.py` would shadow the kernels folder."""
    assert not (ROOT / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_is_a_drawer_of_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    named = [path for path in SOURCES if path.stem in drawers or path.parent.name in drawers]
    assert not named, f"name it after what it does: {named}"


def test_no_file_names_a_developers_machine() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    # Put together here, or this file would be the first one found.
    folders = "|".join(["tmp/" + "bash_jobs", "wo" + "rk/", "ro" + "ot/"])
    forbidden = re.compile(rf"(?<![\w.~-])/(?:{folders})".encode())
    found = []
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" not in data and (match := forbidden.search(data)):
            found.append(f"{name}: {match[0].decode()}")
    assert not found, found
