"""The manifests of docker/kubernetes as kustomize renders them, kept in `rendered/`.

    python tests/containers/rendered_manifests.py

renders them again, with kubectl. A review sees what a change does to a cluster, and where there is
no kubectl the tests look at what was rendered. `rendered/sources` is the digest of their sources.
"""

import hashlib
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "docker/kubernetes"
RENDERED = Path(__file__).with_name("rendered")
DIGEST = RENDERED / "sources"
OVERLAYS = {
    path.name: path
    for path in [SOURCES / "base", *sorted((SOURCES / "overlays").iterdir())]
    if (path / "kustomization.yaml").exists()
}


def kubectl() -> str | None:
    return shutil.which("kubectl")


def render(name: str) -> str:
    """What `kubectl apply -k` would send to a cluster; needs none."""
    command = ["kubectl", "kustomize", OVERLAYS[name]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def digest() -> str:
    """Of every source, by name and content."""
    found = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(SOURCES)} {content}\n".encode())
    return found.hexdigest()


def main() -> None:
    for path in RENDERED.iterdir():
        path.unlink()
    for name in OVERLAYS:
        (RENDERED / f"{name}.yaml").write_text(render(name))
    DIGEST.write_text(f"{digest()}\n")


if __name__ == "__main__":
    main()
