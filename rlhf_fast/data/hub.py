"""Data sets of the hub, by the `datasets` library (extra [hub]): `org/name`, `org/name:split`, `org/name/config:split`.

A set that was loaded before is read from its cache, without a network.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from rlhf_fast.config.data_path import hub_name, rows_sha256
from rlhf_fast.errors import UserError

OFFLINE = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout", "ReadTimeout")
"""Names of the errors that come without a network, and of httpx's and requests' classes that they wrap."""


def require_datasets(part: str) -> None:
    """Raise UserError if the library that reads the hub is not installed."""
    if find_spec("datasets") is None:
        raise UserError(
            f"{part}: there is no such file; if it is a data set of the hub, pip install datasets to read it"
        )


@lru_cache(maxsize=8)
def load_split(part: str) -> Any:
    """Return a split of a data set as a datasets.Dataset. UserError, of one sentence, if it cannot be had."""
    require_datasets(part)
    name, config, split = hub_name(part) or (part, "", "train")
    import datasets

    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    try:
        logger.setLevel(logging.ERROR)  # a line for each try to reach the hub
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # foreign code, which may fail in any way
        raise UserError(f"{part}: {_reason(error, name, split)}") from error
    finally:
        logger.setLevel(before)


@lru_cache(maxsize=8)
def split_sha256(part: str) -> str:
    """Return the checksum of a data set's rows."""
    return rows_sha256(load_split(part))


def _reason(error: BaseException, name: str, split: str) -> str:
    """Return the fault and its remedy."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if "Config name is missing" in text:
        return f"the data set has several configs: give {name}/CONFIG:{split} ({text[:200]})"
    if "Unknown split" in text or "Bad split" in text:
        return f"has no split {split!r}: {text[:200]}"
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError"} and not names & {"OfflineModeIsEnabled"}:
        return (
            "there is no such file, and no such data set on the hub; look at the name, or log in with `hf auth login`"
        )
    if names & set(OFFLINE):
        return (
            "there is no such file, the hub cannot be reached, and no such data set is in its cache; give a local file,"
            " or load it once with a network"
        )
    return f"the data set cannot be loaded: {text[:200]}; look at its page on the hub"
