"""`lq run` killed at random moments, each time resumed: does it end in the bytes of a run that was left alone?

    python -m experiments.scale.kills [--kills 50] [--seed 0] [--out experiments/scale/measured/kills.json]

The time of an undisturbed run is cut into as many equal parts as there are kills, and the moment is drawn within each,
so that all stages are hit. SIGKILL, then `--resume`, then every file is compared but `run.json`, which says what a run
took. Processes share a cache of compiled programs, so that a run takes seconds and not minutes.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from lq.atomic import write_text
from lq.runs.environment import device_name, versions

HERE = Path(__file__).parent
CONFIG = HERE / "kills.yaml"
RUN = "run"  # the config's output, relative to the directory in which a command runs


@dataclasses.dataclass(frozen=True)
class Kill:
    """One interrupted run."""

    moment: float  # seconds after it was started
    stage: str
    same: bool  # whether all files, after it was resumed, are those of a run that was left alone
    said: str = ""  # the last line of a resumed run that failed


class Killer:
    """Runs and kills in directories below `place`."""

    def __init__(self, place: Path, config: Path = CONFIG):
        self.place, self.config = place, config
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.finish("compile")
        started = time.monotonic()
        self.finish("undisturbed")
        self.seconds = time.monotonic() - started
        self.whole = artifacts(place / "undisturbed" / RUN)
        if artifacts(place / "compile" / RUN) != self.whole:
            raise SystemExit("kills: two undisturbed runs differ, so that there is nothing to compare with")

    def start(self, name: str, *options: str) -> subprocess.Popen:
        """`lq run` in a directory of that name."""
        (self.place / name).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "lq", "run", str(self.config), *options]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.place / name, env=self.environment, **pipes)

    def finish(self, name: str, *options: str) -> str:
        """Runs it to its end; the last line that it said if it failed."""
        process = self.start(name, *options)
        said = process.communicate()[1]
        if process.returncode and not options:
            raise SystemExit(f"kills: an undisturbed run failed: {said}")
        return said.strip().splitlines()[-1] if process.returncode else ""

    def kill(self, name: str, moment: float) -> Kill:
        """Kills a run after so many seconds, sooner where it ends before, and resumes it."""
        while not self._killed(name, moment):
            shutil.rmtree(self.place / name)
            moment *= 0.8
        stage = reached(self.place / name / RUN)
        said = self.finish(name, "--resume")
        return Kill(round(moment, 2), stage, not said and artifacts(self.place / name / RUN) == self.whole, said)

    def _killed(self, name: str, moment: float) -> bool:
        process = self.start(name)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return True
        return False


def artifacts(run: Path) -> dict[str, str]:
    """SHA-256 of every file but the record of what a run took, by path."""
    files = {str(file.relative_to(run)): file for file in sorted(run.rglob("*")) if file.is_file()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if name != "run.json"}


def reached(run: Path) -> str:
    """How far a run is, from its files."""
    if not (run / "run.json").exists():
        return "start"
    if (run / "rows.jsonl").exists():
        rows = len((run / "rows.jsonl").read_bytes().splitlines())
    elif len(list(run.glob("scores/*.json"))) < 3:
        return "scoring"
    else:
        rows = 0
    for unfinished in run.glob("unfinished/*"):
        shards = len(list(unfinished.glob("*.safetensors")))
        return f"model {rows + 1}, {'evaluating' if (unfinished / 'lq.json').exists() else f'{shards} files written'}"
    return "report" if (run / "results.json").exists() else f"model {rows + 1}"


def moments(seconds: float, kills: int, seed: int) -> list[float]:
    """One moment within each of as many equal parts of the time."""
    draw = random.Random(seed)
    return [seconds * (i + draw.random()) / kills for i in range(kills)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "measured" / "kills.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        killer, found = Killer(Path(place)), []
        for i, moment in enumerate(moments(killer.seconds, arguments.kills, arguments.seed)):
            found.append(killer.kill(f"killed-{i}", moment))
            print(f"{i + 1}/{arguments.kills}: {found[-1]}", flush=True)
    same = sum(kill.same for kill in found)
    facts = {"undisturbed_seconds": round(killer.seconds, 1), "files": len(killer.whole), "device": device_name()}
    facts |= {"versions": versions(), "same": same, "kills": [dataclasses.asdict(kill) for kill in found]}
    write_text(arguments.out, json.dumps(facts, indent=1) + "\n")
    stages = Counter(kill.stage.split(",")[0] for kill in found)
    print(f"{same} of {len(found)} ended in the same bytes; killed in {dict(stages)}")
    sys.exit(same != len(found))


if __name__ == "__main__":
    main()
