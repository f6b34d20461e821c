"""The model and the texts that come with lq, so that everything can be tried without a download.

`standin`: a 16-block Llama of 10.5 million parameters trained on Python sources (`experiments/standin/`), and two texts it has
never seen, one to calibrate on and one to evaluate on.
"""

from pathlib import Path
from typing import Literal

ASSETS = Path(__file__).parent
NAME = "standin"
DEMO_CONFIG = ASSETS / "demo.yaml"


def resolve_model(name: str) -> str | Path:
    """The directory of the shipped model when `name` is "standin"; otherwise `name` itself."""
    return ASSETS / NAME if name == NAME else name


def resolve_data(name: str, role: Literal["calibration", "evaluation"]) -> str:
    """The shipped text for this role when `name` is "standin"; otherwise `name` itself."""
    return str(ASSETS / "texts" / f"{role}.txt") if name == NAME else name
