"""Two clean builds of a commit are one image, and two stand-ins of a release of Debian are one."""

import pytest
from base_images import make_stand_in, native_platform, stand_in
from build_images import bases
from source_state import source_state

pytestmark = pytest.mark.slow


@pytest.fixture
def removed(engine):
    """Tags of images that are removed at the end."""
    tags = []
    yield tags
    for tag in tags:
        engine.run("rmi", "--force", tag, capture_output=True)


def identity(engine, tag):
    """The digest of its manifest: of all its layers and of what it says of itself."""
    return engine.printed("image", "inspect", "--format={{.Digest}}", tag)


@pytest.mark.parametrize("name", ["bridge", "qemu", "certificates"])
def test_two_clean_builds_are_one_image(name, engine, removed):
    removed += [f"localhost/vmibridge-twice-{name}:{number}" for number in (1, 2)]
    for tag in removed:
        engine.build(name, tag=tag, is_clean=True)
    assert len({identity(engine, tag) for tag in removed}) == 1


def test_another_time_is_another_image(engine, removed):
    """So the digests above are of more than nothing."""
    removed += [f"localhost/vmibridge-twice-certificates:{number}" for number in (3, 4)]
    state = source_state()
    for tag, epoch in zip(removed, (1_700_000_000, 1_700_000_001), strict=True):
        engine.build("certificates", tag=tag, state=state._replace(epoch=epoch), is_clean=True)
    assert len({identity(engine, tag) for tag in removed}) == 2


@pytest.mark.parametrize("name", ["bridge", "qemu"])
def test_a_stand_in_that_is_made_again_is_the_same(name, engine, removed):
    (image,) = bases(name)
    made = stand_in(image, native_platform())
    if not engine.has(made):
        pytest.skip("the registry's own image is there, and nothing was made in its place")
    again = f"{made}-again"
    removed.append(again)
    make_stand_in(engine, image, again, native_platform())
    assert identity(engine, again) == identity(engine, made)
