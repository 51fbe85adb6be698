"""Who may import whom, read from the source: topics -> features -> compression -> inference -> stream."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["topics", "features", "compression", "inference", "stream"]
OURS = {*ORDER, "infra", "tests"}
# Each library that would spread if it could, and the only files of the ordered packages that know it.
HOMES = {
    "kafka": {"topics/admin.py"},
    "redis": {"features/redis_store.py"},
    "grpc": {
        "inference/engines/remote_engine.py",
        "inference/oip/client.py",
        "inference/oip/messages.py",
        "inference/oip/open_inference_pb2_grpc.py",
    },
    "limits": {"inference/admission/shared.py"},
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module a file imports, wherever in the file, with its line; relative ones made absolute."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])])


def breaches(package: str, allowed: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, module in imports(path)
        if module.split(".")[0] in OURS - allowed
    ]


@pytest.mark.parametrize("package", ORDER)
def test_each_package_imports_only_to_its_left(package: str) -> None:
    assert list((ROOT / package).rglob("*.py"))
    assert breaches(package, set(ORDER[: ORDER.index(package) + 1])) == []


def test_infra_imports_no_tests() -> None:
    assert breaches("infra", {*ORDER, "infra"}) == []


def test_a_wrong_import_would_be_seen() -> None:
    found = breaches("inference", set())
    assert any("imports features" in breach for breach in found)


@pytest.mark.parametrize("library", HOMES)
def test_a_client_library_stays_at_home(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ORDER
        for path in (ROOT / package).rglob("*.py")
        for _, module in imports(path)
        if module.split(".")[0] == library
    }
    assert users == HOMES[library]


def test_serving_needs_no_torch() -> None:
    """Every module but the engines themselves, in an interpreter where torch cannot be found."""
    script = """
        import importlib, pkgutil, sys

        class NoTorch:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "torch":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoTorch())
        import topics, features, inference, stream

        for package in (topics, features, inference, stream):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                if not module.name.endswith(("_engine", "__main__")):
                    importlib.import_module(module.name)
        assert "torch" not in sys.modules
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("package", ["topics", "features", "inference", "stream"])
def test_importing_a_package_is_cheap(package: str) -> None:
    heavy = "{'torch', 'faust', 'kafka', 'redis', 'limits', 'onnxruntime', 'openvino', 'faiss', 'grpc'}"
    script = f"import sys, {package}; print(*sorted({heavy} & set(sys.modules)))"
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == []
