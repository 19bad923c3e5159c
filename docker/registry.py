"""Asks a registry of images for a digest, by the HTTP API of OCI's distribution specification."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request

SECONDS = 30
MAX_BYTES = 1 << 20
HOSTS = {"docker.io": "registry-1.docker.io"}
"""Where Docker's own names are served."""
LISTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class RegistryError(Exception):
    """A registry cannot be asked, or answers what is no digest."""


def digest_of(image: str, *, scheme: str = "https") -> str:
    """The digest of HOST/NAME:TAG: of the list for all platforms, if it has one.

    Raises `RegistryError`.
    """
    host, _, rest = image.partition("/")
    name, _, tag = rest.rpartition(":")
    address = f"{scheme}://{HOSTS.get(host, host)}/v2/{name}/manifests/{tag}"
    headers = {"Accept": ", ".join(LISTS)}
    try:
        try:
            found = _asked(address, headers)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            token = _token(error.headers.get("WWW-Authenticate", ""), scheme)
            found = _asked(address, {**headers, "Authorization": f"Bearer {token}"})
    except (OSError, ValueError) as error:
        raise RegistryError(f"{image}: {error}") from error
    if not DIGEST.fullmatch(found):
        raise RegistryError(f"{image}: the registry gives no digest")
    return found


def _asked(address: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(address, headers=headers, method="HEAD")
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return str(answer.headers.get("Docker-Content-Digest", ""))


def _token(challenge: str, scheme: str) -> str:
    """What an anonymous user may pull with. Raises `ValueError` and `OSError`."""
    told = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = told.pop("realm", "")
    if not challenge.startswith("Bearer ") or not realm.startswith(f"{scheme}://"):
        raise ValueError(f"it wants {challenge[:100]!r}")
    query = urllib.parse.urlencode(told)
    with urllib.request.urlopen(f"{realm}?{query}", timeout=SECONDS) as answer:
        found = json.loads(answer.read(MAX_BYTES))
    token = found.get("token") or found.get("access_token")
    if not token:
        raise ValueError("it gives no token")
    return str(token)
