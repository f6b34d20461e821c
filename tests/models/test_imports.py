"""What importing costs: the command line imports these modules before it knows whether it needs jax."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lq.models", {"jax", "flax", "transformers"}),
        ("lq.models.config", {"jax", "flax", "transformers"}),
        ("lq.models.loading", {"transformers", "huggingface_hub", "torch"}),
        ("lq.models.generate", {"transformers", "huggingface_hub", "torch"}),
    ],
)
def test_import_leaves_out(module, absent):
    program = f"import sys, {module}; print(sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names_of_the_package():
    import lq.models

    for name in lq.models.__all__:
        assert getattr(lq.models, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        lq.models.no_such_name  # noqa: B018
