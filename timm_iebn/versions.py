"""What other packages' versions this one works with: as `pyproject.toml` says, and its tests have shown."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version


def check_versions(extra: str = "") -> None:
    """Compares what is installed with what this package requires; with what its `extra` requires, where one is given.

    Raises:
        ImportError: a package is older or newer; names both versions and the remedy.
    """
    try:
        wanted = [Requirement(line) for line in metadata.requires("timm-iebn") or ()]
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate(dict(extra=extra)):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:  # whoever needs it will say so: many are for some options only
            continue
        # 2.8.0a0+nv25 is the 2.8 of its builder, and so for nightlies
        if Version(found).base_version not in requirement.specifier:
            text = f"{requirement.name}{requirement.specifier}"
            raise ImportError(f"timm-iebn needs {text}, and finds {found}: pip install '{text}'")
