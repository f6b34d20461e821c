"""JSON objects that carry their own checksum, so that a bit that has changed since is found before they are used."""

import hashlib
import json
from typing import Any

SEAL = "sha256"


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """`data` as JSON gives it back, with the SHA-256 of what it says as one more key.

    Spaces, and the order of keys, say nothing.
    """
    data = json.loads(json.dumps(data))
    return {**data, SEAL: _digest(data)}


def unsealed(data: Any) -> Any:
    """What was sealed. An object without a checksum, one that someone has written by hand, passes as it is.

    Raises ValueError when the checksum is that of something else.
    """
    if not isinstance(data, dict) or SEAL not in data:
        return data
    rest = {key: value for key, value in data.items() if key != SEAL}
    if data[SEAL] != _digest(rest):
        raise ValueError(f"its checksum does not match: damaged, or changed by hand; then take out its {SEAL!r}")
    return rest


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
