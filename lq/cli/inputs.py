"""What several verbs read: calibration text, and plans of the model at hand."""

from pathlib import Path

from lq.errors import UserError


def calibration_text(source, data: str, samples: int, length: int | None, seed: int):
    """Windows to calibrate on."""
    from lq.api import calibration_windows
    from lq.calibration.stream import window_for
    from lq.models.loading import load_tokenizer

    tokenizer, length = load_tokenizer(source.path), window_for(source.config, length)
    return calibration_windows(tokenizer, data, samples=samples, length=length, seed=seed)


def reads_text(metrics: list[str]) -> bool:
    """Whether one of the metrics looks at calibration text."""
    from lq.importance import METRICS

    return any("calibration" in METRICS[name].needs for name in metrics)


def plan_of(path: Path, source, model: str):
    from lq.allocation import Plan
    from lq.models.fingerprint import fingerprint

    plan = Plan.read(path)
    if plan.model != fingerprint(source):
        raise UserError(f"{path}: a plan of another model; make one from the scores of {model}")
    return plan
