"""Writes what is in an image as an SBOM in the format of CycloneDX (ECMA-424, version 1.6).

    python image_sbom.py NAME VERSION [--with FILE] [--python] [--also NAME] -o OUT

Debian's packages are those of `status`, dpkg's list, and the system is that of `os-release`, both
in the current folder. `--with` is the SBOM of a Python environment, as cyclonedx-py writes it;
`--python` adds the Python that runs this, and `--also` a part that is in no package, of the same
VERSION.

The same input gives the same bytes: the only time is SOURCE_DATE_EPOCH, and the serial number is
made of the content.
"""

import argparse
import json
import os
import platform
import re
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

NAMESPACE = uuid.UUID("5b8a1f6e-2f0d-4c55-9d0e-6a3c8a7d9f10")
"""Of the serial numbers that are made here."""
INSTALLED = "install ok installed"
Json = dict[str, Any]
"""An object of JSON."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("version")
    parser.add_argument("--with", dest="environment")
    parser.add_argument("--python", action="store_true")
    parser.add_argument("--also")
    parser.add_argument("-o", dest="out", required=True)
    options = parser.parse_args()
    packages = stanzas(Path("status").read_text("utf-8"))
    system = os_release(Path("os-release").read_text("utf-8"))
    environment: Json = {}
    if options.environment:
        environment = json.loads(Path(options.environment).read_text("utf-8"))
    parts = [operating_system(system), *debian_components(packages, system)]
    if options.python:
        parts.append(cpython(platform.python_version()))
    if options.also:
        parts.append({"type": "library", "name": options.also, "version": options.version})
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    found = document(
        options.name, options.version, environment, parts, int(epoch) if epoch else None
    )
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    Path(options.out).write_text(text, "utf-8")


def document(
    name: str, version: str, environment: Json, parts: list[Json], epoch: int | None
) -> Json:
    """The SBOM of an image: the components of `environment`, if any, and `parts`."""
    own = {"type": "container", "bom-ref": f"image:{name}", "name": name, "version": version}
    metadata = {**environment.get("metadata", {}), "component": own}
    metadata.pop("timestamp", None)
    if epoch is not None:
        metadata["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    components = [
        {**part, "bom-ref": part.get("bom-ref", f"{part['type']}:{part['name']}")}
        for part in [*environment.get("components", []), *parts]
    ]
    components.sort(key=lambda each: each["bom-ref"])
    relations = [
        each for each in environment.get("dependencies", []) if each["ref"] != "root-component"
    ]
    known = {each["bom-ref"] for each in components}
    relations = [each for each in relations if each["ref"] in known]
    relations.append({"ref": own["bom-ref"], "dependsOn": sorted(known)})
    body = {"metadata": metadata, "components": components, "dependencies": relations}
    serial = uuid.uuid5(NAMESPACE, json.dumps(body, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **body,
    }


def stanzas(text: str) -> list[dict[str, str]]:
    """The installed packages of dpkg's list, in the order of names (deb822(5))."""
    found = []
    for part in re.split(r"\n\n+", text):
        # Lines that begin with a blank go on with a field, which none of those that are read does.
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", part, re.MULTILINE))
        if fields.get("Status") == INSTALLED:
            found.append(fields)
    return sorted(found, key=lambda each: (each["Package"], each["Architecture"]))


def debian_components(packages: list[dict[str, str]], system: dict[str, str]) -> list[Json]:
    """With package URLs (purl-spec, type deb), by which scanners find what is known of them."""
    distribution = f"{system['ID']}-{system['VERSION_ID']}"
    found = []
    for each in packages:
        name, version, architecture = each["Package"], each["Version"], each["Architecture"]
        url = f"pkg:deb/{system['ID']}/{quote(name, safe='')}@{quote(version, safe='')}"
        url += f"?arch={architecture}&distro={distribution}"
        # "Source: NAME (VERSION)", where either differs from that of the package.
        source, _, other = each.get("Source", name).partition(" ")
        properties = [{"name": "debian:source", "value": source}]
        properties.append({"name": "debian:source-version", "value": other.strip("()") or version})
        component: Json = {"type": "library", "bom-ref": url, "name": name, "version": version}
        component["purl"] = url
        component["properties"] = properties
        if maintainer := each.get("Maintainer"):
            component["supplier"] = {"name": maintainer.partition(" <")[0]}
        found.append(component)
    return found


def cpython(version: str) -> Json:
    return {
        "type": "platform",
        "bom-ref": f"pkg:generic/python@{version}",
        "name": "CPython",
        "version": version,
        "cpe": f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*",
        "purl": f"pkg:generic/python@{version}",
        "licenses": [{"license": {"id": "PSF-2.0"}}],
    }


def operating_system(system: dict[str, str]) -> Json:
    return {"type": "operating-system", "name": system["ID"], "version": system["VERSION_ID"]}


def os_release(text: str) -> dict[str, str]:
    """os-release(5)."""
    return dict(re.findall(r'^(\w+)="?(.*?)"?$', text, re.MULTILINE))


if __name__ == "__main__":
    main()
