"""Whether a package is installed."""

import importlib.util


def is_installed(name: str) -> bool:
    """Whether a package can be imported. A plain folder of its name in the current one, which
    Python would import as an empty package, does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and (spec.origin is not None or not spec.submodule_search_locations)
