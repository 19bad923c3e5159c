"""Takes out of an image what podman put there by chance: ids of what it was built in."""

import hashlib
import json
from pathlib import Path

CHANCE = ("container", "container_config", "parent")
"""Fields of an image's configuration that say in what it was built."""
FROM = "FROM "
"""How podman's comment on a step begins, before the id of the image that it went on from."""


def normalize(folder: Path) -> None:
    """Rewrite an image that is saved as `docker-dir`: its configuration, and its manifest.

    Layers, and what a container of the image gets, are as before.
    """
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    before = folder / manifest["config"]["digest"].removeprefix("sha256:")
    config = json.loads(before.read_bytes())
    for name in CHANCE:
        config.pop(name, None)
    config["config"].pop("Hostname", None)
    for step in config["history"]:
        if step.get("comment", "").startswith(FROM):
            del step["comment"]
    data = json.dumps(config, separators=(",", ":"), sort_keys=True).encode()
    before.unlink()
    name = hashlib.sha256(data).hexdigest()
    (folder / name).write_bytes(data)
    manifest["config"].update(digest=f"sha256:{name}", size=len(data))
    path.write_text(json.dumps(manifest, separators=(",", ":")))
