"""Files of tensors, written whole or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from lq.atomic import write_file

NUMBER = re.compile(r"os error (\d+)")


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, atomically.

    Raises OSError that names `file` when it cannot be written, as on a full disk; safetensors itself raises another
    class, with the number in its message.
    """

    def write(path: Path) -> None:
        try:
            safetensors.numpy.save_file(dict(tensors), path)
        except SafetensorError as error:
            if (number := NUMBER.search(str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error

    write_file(file, write)
