"""docker/normal_image.py, on images that are made by hand."""

import hashlib
import json
from pathlib import Path

import pytest
from normal_image import normalize

ROOT = Path(__file__).parents[2]


@pytest.fixture
def built(tmp_path):
    """An image as podman saves it: what one build and another have by chance is the argument."""

    def build(chance):
        config = {
            "architecture": "amd64",
            "container": chance,
            "container_config": {"Hostname": chance[:12]},
            "parent": f"sha256:{chance}",
            "config": {"Hostname": chance[:12], "Cmd": ["sh"], "Healthcheck": {"Test": ["CMD"]}},
            "history": [
                {"created_by": "ADD", "comment": "made by hand"},
                {"created_by": "RUN", "comment": f"FROM {chance[:12]}"},
            ],
        }
        data = json.dumps(config).encode()
        name = hashlib.sha256(data).hexdigest()
        folder = tmp_path / chance
        folder.mkdir()
        (folder / name).write_bytes(data)
        told = {"digest": f"sha256:{name}", "size": len(data)}
        manifest = {"config": told, "layers": [{"digest": "sha256:1a", "size": 7}]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "1a").write_text("a layer")
        return folder

    return build


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_that_differ_by_chance_are_one_image(built):
    first, second = built("a1" * 32), built("b2" * 32)
    assert files(first) != files(second)
    normalize(first)
    normalize(second)
    assert files(first) == files(second)


def test_what_the_image_is_stays(built):
    folder = built("a1" * 32)
    normalize(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["layers"] == [{"digest": "sha256:1a", "size": 7}]
    data = (folder / manifest["config"]["digest"].removeprefix("sha256:")).read_bytes()
    assert manifest["config"]["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert manifest["config"]["size"] == len(data)
    config = json.loads(data)
    assert config["config"] == {"Cmd": ["sh"], "Healthcheck": {"Test": ["CMD"]}}
    assert [step["created_by"] for step in config["history"]] == ["ADD", "RUN"]
    assert config["history"][0]["comment"] == "made by hand"


def test_twice_is_as_once(built):
    folder = built("a1" * 32)
    normalize(folder)
    once = files(folder)
    normalize(folder)
    assert files(folder) == once
