"""Names of the sites inside layers at which `DepthProfile` measures; knows no torch, for those who read records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Site = Literal["block", "attention", "mlp", "head"]
BLOCK: Site = "block"
HEAD: Site = "head"
_WRITERS = {"attention": "attention", "mlp": "the MLP"}


def check_sites(sites: Sequence[str]) -> None:
    """Raises a ValueError if these are no sites of `DepthProfile`."""
    unknown = [site for site in sites if site not in get_args(Site)]
    if isinstance(sites, str) or unknown or BLOCK not in sites or len(set(sites)) < len(sites):
        raise ValueError(f"sites={sites!r}: pass 'block' and any of {get_args(Site)[1:]}, each once, in a tuple.")


def is_head(site: str) -> bool:
    """Returns whether a site is one of the heads.

    >>> is_head("head03"), is_head("mlp")
    (True, False)
    """
    return site.startswith(HEAD)


def site_title(site: str) -> str:
    """Returns what a change at a site is the change of, in words.

    >>> site_title("head03"), site_title("mlp")
    ('of head 3', 'of what the MLP writes')
    """
    return f"of head {int(site.removeprefix(HEAD))}" if is_head(site) else f"of what {_WRITERS[site]} writes"
