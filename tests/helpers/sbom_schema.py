"""Whether a software bill of materials is what CycloneDX says that it is."""


def check_sbom(text):
    """Fails for one that is not of the schema."""
    # Not at the head: its libraries take two seconds of each process that collects tests.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
